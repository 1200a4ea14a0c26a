// Files that survive whatever ends the process, and text fit for a terminal.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "base/error.h"

namespace corolla {

// What the disk does not do: its owner may make room.
class DiskError : public Error {
 public:
  using Error::Error;
};

// Throws DiskError "<what> <path>: <why>", the why being that of the last system call.
[[noreturn]] void fail(const std::string& what, const std::filesystem::path& path);

// Everything in a file of at most `most` bytes; nothing when there is none or it is longer.
std::optional<std::string> read_file(const std::filesystem::path& path, uint64_t most = 1 << 20);

// Replaces a file as a whole, for its owner alone: after a crash there is the old or the new one.
// Throws DiskError.
void write_file(const std::filesystem::path& path, const std::string& data);

void make_folder(const std::filesystem::path& path);  // throws DiskError

// sha256 as 64 hexadecimal characters; empty when the file cannot be read.
std::string file_sha256(const std::filesystem::path& path);

// The printable ASCII of a text from outside, shortened: valid in a message, harmless on a
// terminal.
std::string one_line(const std::string& text);

std::string human_bytes(uint64_t bytes);  // "12 MB"

// An open file. Throws DiskError when it cannot be opened.
class File {
 public:
  File(const std::filesystem::path& path, int flags);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // At most `size` bytes from an offset on; fewer at the end.
  std::string read(uint64_t offset, size_t size) const;
  void write(uint64_t offset, const std::string& data) const;
  void truncate(uint64_t size) const;
  void sync() const;
  int descriptor() const { return descriptor_; }

 private:
  std::filesystem::path path_;
  int descriptor_;
};

}  // namespace corolla
