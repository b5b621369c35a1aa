// Compiler glue: what lets one header serve the host, every instruction set and the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KLDIV_HD __host__ __device__ __forceinline__
#else
#define KLDIV_HD inline __attribute__((always_inline))
#endif

// Code compiled for an instruction set lives in a namespace of that name; otherwise the linker could
// keep an AVX-512 body of an inline function and call it on a machine that has none.
#if !defined(KLDIV_ISA)
#define KLDIV_ISA portable
#endif
