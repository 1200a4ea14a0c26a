#include "base/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/hash.h"

namespace corolla {
namespace {

constexpr size_t kPiece = 1 << 20;
constexpr size_t kLongest = 300;  // characters of a line that a peer sent

}  // namespace

void fail(const std::string& what, const std::filesystem::path& path) {
  throw DiskError(what + " " + path.string() + ": " + std::strerror(errno));
}

File::File(const std::filesystem::path& path, int flags)
    : path_(path), descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0600)) {
  if (descriptor_ < 0) fail("cannot open", path_);
}

File::~File() { ::close(descriptor_); }

std::string File::read(uint64_t offset, size_t size) const {
  std::string data(size, '\0');
  size_t done = 0;
  while (done < size) {
    ssize_t got = ::pread(descriptor_, &data[done], size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("cannot read", path_);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  data.resize(done);
  return data;
}

void File::write(uint64_t offset, const std::string& data) const {
  size_t done = 0;
  while (done < data.size()) {
    ssize_t put = ::pwrite(descriptor_, &data[done], data.size() - done,
                           static_cast<off_t>(offset + done));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("cannot write", path_);
    done += static_cast<size_t>(put);
  }
}

void File::truncate(uint64_t size) const {
  if (::ftruncate(descriptor_, static_cast<off_t>(size)) < 0) fail("cannot write", path_);
}

void File::sync() const {
  if (::fsync(descriptor_) < 0) fail("cannot write", path_);
}

std::optional<std::string> read_file(const std::filesystem::path& path, uint64_t most) {
  try {
    File file(path, O_RDONLY);
    struct stat facts{};
    if (::fstat(file.descriptor(), &facts) < 0 || !S_ISREG(facts.st_mode)) return std::nullopt;
    if (static_cast<uint64_t>(facts.st_size) > most) return std::nullopt;
    return file.read(0, static_cast<size_t>(facts.st_size));
  } catch (const DiskError&) {
    return std::nullopt;
  }
}

void write_file(const std::filesystem::path& path, const std::string& data) {
  std::filesystem::path scratch = path;
  scratch += ".new";
  {
    File file(scratch, O_WRONLY | O_CREAT | O_TRUNC);
    file.write(0, data);
    file.sync();
  }
  if (std::rename(scratch.c_str(), path.c_str()) < 0) fail("cannot write", path);
}

void make_folder(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) throw DiskError("cannot make the folder " + path.string() + ": " + error.message());
}

std::string file_sha256(const std::filesystem::path& path) {
  try {
    File file(path, O_RDONLY);
    Sha256 whole;
    for (uint64_t at = 0;;) {
      std::string piece = file.read(at, kPiece);
      if (piece.empty()) return whole.hex();
      whole.update(piece);
      at += piece.size();
    }
  } catch (const DiskError&) {
    return "";
  }
}

std::string one_line(const std::string& text) {
  std::string line;
  for (char c : text.substr(0, kLongest)) {
    bool space = c == ' ' || (c >= '\t' && c <= '\r');
    bool printable = c > ' ' && c < 0x7f;
    if (printable) line += c;
    else if (!space) line += '?';
    else if (!line.empty() && line.back() != ' ') line += ' ';
  }
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line;
}

std::string human_bytes(uint64_t bytes) {
  char text[32];
  double count = static_cast<double>(bytes);
  if (count >= 1e9) std::snprintf(text, sizeof text, "%.1f GB", count / 1e9);
  else if (count >= 1e6) std::snprintf(text, sizeof text, "%.0f MB", count / 1e6);
  else std::snprintf(text, sizeof text, "%.0f kB", count / 1e3);
  return text;
}

}  // namespace corolla
