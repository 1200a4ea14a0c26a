// Half types by hand: not every compiler of a phone has them.
#pragma once

#include <cstdint>

namespace corolla {

float float_of_bits(uint32_t bits);
uint32_t bits_of_float(float x);

float from_fp16(uint16_t half);  // exact
uint16_t to_fp16(float x);       // to nearest, ties to even; beyond 65504 infinity

// The nearest bf16, ties to even, as a float.
float rounded_to_bf16(float x);

}  // namespace corolla
