#define FASTMRC_ISA_NAMESPACE isa_avx2
#include "cpu/kernels_impl.h"
