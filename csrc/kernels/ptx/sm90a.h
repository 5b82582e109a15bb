// Whether this is device code for compute capability 9.0a, which has instructions of its own.
#pragma once

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FCB_SM90A 1
#endif
