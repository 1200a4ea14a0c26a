// Digests of files, tensors and seeds.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace corolla {

// SHA-256 (FIPS 180-4) of what is fed piece by piece.
class Sha256 {
 public:
  Sha256();
  void update(std::string_view data);
  // 64 hexadecimal characters; nothing can be added afterwards.
  std::string hex();

 private:
  void block(const uint8_t* data);

  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> buffer_{};
  size_t held_ = 0;
  uint64_t bytes_ = 0;
};

std::string sha256(std::string_view data);  // 64 hexadecimal characters

// BLAKE2b (RFC 7693) without a key: `size` raw bytes, 1 to 64.
std::string blake2b(std::string_view data, size_t size);

uint32_t crc32(std::string_view data);  // of zlib and IEEE 802.3

std::string hex(std::string_view bytes);

// Whether a text is `length` lower-case hexadecimal characters: ids become names of files.
bool is_hex(std::string_view text, size_t length);

}  // namespace corolla
