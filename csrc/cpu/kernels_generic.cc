#define FASTMRC_ISA_NAMESPACE isa_generic
#include "cpu/kernels_impl.h"
