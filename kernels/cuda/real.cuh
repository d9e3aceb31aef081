// The type that a kernel's arrays are of: `real`, which -DREAL names: half, __nv_bfloat16, double, else float.
//
// What is summed up is summed up in `sum`: float, and double for double.
#pragma once

#include "ptx.cuh"

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

template <class T> struct SumOf { typedef float type; };
template <> struct SumOf<double> { typedef double type; };
typedef SumOf<real>::type sum;
