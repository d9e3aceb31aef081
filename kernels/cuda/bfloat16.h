// bfloat16 on a CPU: the first 16 bits of a float, rounded to nearest, of two as near to the even one, as on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#define UNWATCHED inline __attribute__((no_sanitize("thread")))

UNWATCHED uint16_t bfloat16_bits(float v) {
    uint32_t all;
    std::memcpy(&all, &v, 4);
    return v != v ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
}
UNWATCHED float float_of_bfloat16(uint16_t bits) {
    const uint32_t all = (uint32_t)bits << 16;
    float v;
    std::memcpy(&v, &all, 4);
    return v;
}
