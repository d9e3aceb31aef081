// The type of 16 bits that a kernel's arrays are of: `narrow`, which -DNARROW names: half, or __nv_bfloat16.
#pragma once

#include "ptx.cuh"

#ifndef NARROW
#define NARROW half
#endif
typedef NARROW narrow;
