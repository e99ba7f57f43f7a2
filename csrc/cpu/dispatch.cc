// Chooses the kernel table once, by what the processor offers.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastmrc {

namespace isa_generic {
const Kernels& table();
}
#ifdef FASTMRC_X86_KERNELS
namespace isa_avx2 {
const Kernels& table();
}
namespace isa_avx512 {
const Kernels& table();
}
#endif

namespace {

constexpr Isa kAll[] = {Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};  // best first

Isa choose_isa() {
  const char* forced = std::getenv("FASTMRC_FORCE_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (Isa isa : kAll) {
      if (std::string(forced) != isa_name(isa)) continue;
      if (isa_available(isa)) return isa;
      throw std::invalid_argument(std::string("FASTMRC_FORCE_ISA: this machine or build has no ") +
                                  forced);
    }
    throw std::invalid_argument(
        std::string("FASTMRC_FORCE_ISA: expected generic, avx2 or avx512, got ") + forced);
  }
  for (Isa isa : kAll) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kGeneric;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

bool isa_available(Isa isa) {
#ifdef FASTMRC_X86_KERNELS
  __builtin_cpu_init();
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kGeneric;
}

const Kernels& kernels_of(Isa isa) {
  if (!isa_available(isa)) {
    throw std::invalid_argument(std::string("isa: this machine or build has no ") + isa_name(isa));
  }
#ifdef FASTMRC_X86_KERNELS
  if (isa == Isa::kAvx2) return isa_avx2::table();
  if (isa == Isa::kAvx512) return isa_avx512::table();
#endif
  return isa_generic::table();
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const Kernels& kernels() {
  static const Kernels& table = kernels_of(active_isa());
  return table;
}

}  // namespace fastmrc
