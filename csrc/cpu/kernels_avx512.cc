#define FASTMRC_ISA_NAMESPACE isa_avx512
#include "cpu/kernels_impl.h"
