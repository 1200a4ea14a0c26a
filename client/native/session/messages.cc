#include "session/messages.h"

#include <algorithm>
#include <set>

#include "base/files.h"
#include "base/hash.h"
#include "base/wire.h"

namespace corolla {
namespace {

bool plain(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
}

bool plain_or_mark(char c) { return plain(c) || c == '.' || c == '-'; }

bool is_part(const std::string& part) {
  return !part.empty() && plain(part[0]) && std::all_of(part.begin(), part.end(), plain_or_mark);
}

void check_path(const std::string& path) {
  bool good = path.size() <= 200;
  for (size_t at = 0; good && at <= path.size();) {
    size_t end = std::min(path.find('/', at), path.size());
    good = is_part(path.substr(at, end - at));
    at = end + 1;
  }
  if (!good) throw WireError("'" + one_line(path) + "' is no file of a bundle");
}

// What is not signed is small: it is fetched before its signature can be checked.
uint64_t most_bytes(const std::string& path) {
  if (path == "manifest.json") return kMaxDescription;
  if (path == "manifest.sig") return kSignature;
  return kMaxChunks * kChunk;
}

uint64_t chunks_of(uint64_t size) { return (size + kChunk - 1) / kChunk; }

// A message of a type whose repeated fields are those of the list.
template <class M>
M read(std::string_view data, const std::vector<Repeated>& fields) {
  try {
    check_counts(data, fields);
  } catch (const Error& error) {
    throw WireError(error.what());
  }
  M found;
  if (!found.ParseFromArray(data.data(), static_cast<int>(data.size())))
    throw WireError("message cannot be parsed");
  return found;
}

using In = v1::CheckInResponse;
using Work = v1::Task;
using All = v1::Manifest;

const std::vector<Repeated> kAnswer = {
    {{In::kLeaseFieldNumber, v1::Lease::kCachedFieldNumber}, kMaxCached, "cached groups"}};
const std::vector<Repeated> kTask = {
    {{Work::kCachedFieldNumber}, kMaxCached, "cached groups"},
    {{Work::kScalarsFieldNumber}, kMaxScalarGroups, "groups of scalars"},
    {{Work::kLogFieldNumber, v1::Log::kRowsFieldNumber}, kMaxRows, "rows of a log"}};
const std::vector<Repeated> kManifest = {{{All::kFilesFieldNumber}, kMaxFiles, "files"}};

}  // namespace

bool is_device(const std::string& name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), plain_or_mark);
}

void check_id(const std::string& text) {
  if (!is_hex(text, 32)) throw WireError("an id has 32 hexadecimal characters");
}

void check_blob(const v1::Blob& blob, uint64_t most) {
  if (blob.size() > most)
    throw WireError("blob has " + std::to_string(blob.size()) + " bytes, at most " +
                    std::to_string(most));
  if (blob.size() && !is_hex(blob.sha256(), 64))
    throw WireError("a blob is named by 64 hexadecimal characters");
  const std::string& all = blob.inline_();
  if (!all.empty() && (all.size() != blob.size() || sha256(all) != blob.sha256()))
    throw WireError("blob does not match its checksum");
}

void check_chunk(const v1::Chunk& chunk, uint64_t offset, uint64_t size) {
  if (chunk.offset() != offset || chunk.size() != size)
    throw WireError("chunk is of " + std::to_string(chunk.offset()) + " in " +
                    std::to_string(chunk.size()) + ", not of " + std::to_string(offset) + " in " +
                    std::to_string(size));
  uint64_t expected = std::min(kChunk, size - offset);
  if (chunk.content().size() != expected)
    throw WireError("chunk has " + std::to_string(chunk.content().size()) + " bytes, not " +
                    std::to_string(expected));
  if (crc32(chunk.content()) != chunk.crc32()) throw WireError("chunk does not match its checksum");
}

v1::Manifest read_files(const std::string& data) {
  auto found = read<v1::Manifest>(data, kManifest);
  if (!found.files_size()) throw WireError("manifest names no file");
  std::set<std::string> paths;
  for (const auto& file : found.files()) {
    check_path(file.path());
    check_blob(file.blob(), most_bytes(file.path()));
    if (file.chunks().size() != 32 * chunks_of(file.blob().size()))
      throw WireError("manifest does not name the chunks of " + file.path());
    if (!paths.insert(file.path()).second) throw WireError("manifest names a file twice");
  }
  return found;
}

v1::Task read_task(const std::string& header) {
  auto task = read<v1::Task>(header, kTask);
  check_id(task.run_id());  // it becomes a file's name
  return task;
}

v1::CheckInResponse read_answer(std::string_view data) {
  return read<v1::CheckInResponse>(data, kAnswer);
}

v1::Chunk make_chunk(const std::string& content, uint64_t offset, uint64_t size,
                     const std::string& lease) {
  v1::Chunk chunk;
  chunk.set_lease(lease);
  chunk.set_offset(offset);
  chunk.set_content(content);
  chunk.set_crc32(crc32(content));
  chunk.set_size(size);
  return chunk;
}

v1::Reply given_up(const v1::Task& task, const std::string& client, const std::string& why) {
  v1::Reply reply;
  reply.set_schema(task.schema());
  reply.set_run_id(task.run_id());
  reply.set_round(task.round());
  reply.set_base_version(task.base_version());
  reply.set_kind(task.kind());
  reply.set_client(client);
  reply.set_payload_sha256(sha256(""));
  reply.set_error(one_line(why));
  return reply;
}

}  // namespace corolla
