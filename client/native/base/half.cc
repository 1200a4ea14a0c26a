#include "base/half.h"

#include <cmath>
#include <cstring>

namespace corolla {

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_fp16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023u;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | mantissa << 13);
  if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -small : small;
}

uint16_t to_fp16(float x) {
  const uint32_t bits = bits_of_float(x), size = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (size > 0x7F800000u) return sign | 0x7E00u | (size >> 13 & 0x3FFu);
  if (size >= 0x477FF000u) return sign | 0x7C00u;
  const uint32_t exponent = size >> 23;
  if (exponent < 102) return sign;  // below half of the smallest number
  // Shifted so that the last bit kept is that of the result; the rest decides the rounding.
  const uint32_t mantissa = (size & 0x7FFFFFu) | 0x800000u;
  const uint32_t shift = exponent < 113 ? 126 - exponent : 13;
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
  const uint32_t middle = 1u << (shift - 1);
  const uint32_t up = rest > middle || (rest == middle && (kept & 1));
  const uint32_t biased = exponent < 113 ? kept : kept + ((exponent - 113) << 10);
  return sign | static_cast<uint16_t>(biased + up);  // a carry goes into the exponent, as it should
}

float rounded_to_bf16(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return x;
  return float_of_bits((bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u);
}

}  // namespace corolla
