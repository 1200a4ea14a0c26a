#include "session/download.h"

#include <fcntl.h>

#include <algorithm>
#include <cstdio>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"

namespace corolla {
namespace {

namespace fs = std::filesystem;

constexpr int kTries = 3;              // how often a chunk is asked for that arrives damaged
constexpr char kFiles[] = ".files";    // the message Manifest; no path in it begins with a point
constexpr char kLast[] = "current";    // the name of the bundle that is used
constexpr size_t kDigest = 32;         // bytes of a chunk's sha256 in a Manifest

// The sha256 of the chunk at an offset; empty where it can be checked with the whole alone.
std::string expected_at(uint64_t at, const v1::Blob& blob, const std::string& chunks) {
  if (!chunks.empty()) return hex(chunks.substr(at / kChunk * kDigest, kDigest));
  return blob.size() <= kChunk ? blob.sha256() : "";
}

bool is(const std::string& piece, const std::string& expected) {
  return expected.empty() || sha256(piece) == expected;
}

std::string get_chunk(const v1::Blob& blob, uint64_t at, const std::string& expected,
                      const Download& download) {
  std::string why = "other content than announced";
  v1::DownloadRequest request;
  request.set_sha256(blob.sha256());
  request.set_offset(at);
  for (int i = 0; i < kTries; ++i) {
    v1::Chunk found = download(request, std::min(kChunk, blob.size() - at));
    try {
      check_chunk(found, at, blob.size());
    } catch (const WireError& error) {
      why = error.what();
      continue;
    }
    if (is(found.content(), expected)) return std::move(*found.mutable_content());
  }
  throw WireError("the gateway sends a wrong chunk at " + std::to_string(at) + " of " +
                  blob.sha256().substr(0, 12) + ": " + why);
}

// Writes a blob to a file, beginning after the chunks that are there and right.
void fetch_file(const v1::Blob& blob, const std::string& chunks, const fs::path& path,
                const Download& download) {
  Sha256 whole;
  {
    File file(path, O_RDWR | O_CREAT);
    for (uint64_t at = 0; at < blob.size(); at += kChunk) {
      std::string expected = expected_at(at, blob, chunks);
      size_t size = std::min(kChunk, blob.size() - at);
      std::string piece = file.read(at, size);
      if (piece.size() < size || !is(piece, expected)) {
        file.truncate(at);
        piece = get_chunk(blob, at, expected, download);
        file.write(at, piece);
      }
      whole.update(piece);
    }
    file.truncate(blob.size());
    file.sync();
  }
  if (whole.hex() == blob.sha256()) return;
  fs::remove(path);
  throw WireError("the gateway's " + path.filename().string() + " does not match its checksum");
}

bool is_description(const v1::Manifest::File& file) {
  return file.path() == "manifest.json" || file.path() == "manifest.sig";
}

// What is signed is what was announced.
void check_same(const Manifest& manifest, const v1::Manifest& files) {
  for (const auto& file : files.files()) {
    if (is_description(file)) continue;
    auto known = manifest.files.find(file.path());
    if (known == manifest.files.end() || known->second.sha256 != file.blob().sha256() ||
        known->second.bytes != file.blob().size())
      throw WireError(file.path() + " is not the one in the signed manifest.json");
  }
}

// The manifest and its signature, or all the other files.
void fill(const fs::path& scratch, const v1::Manifest& files, const Download& download,
          bool description) {
  for (const auto& file : files.files()) {
    if (is_description(file) != description) continue;
    fs::path path = scratch / file.path();
    make_folder(path.parent_path());
    fetch_file(file.blob(), file.chunks(), path, download);
  }
}

// Bytes that fill has to fetch.
uint64_t lacking(const fs::path& scratch, const v1::Manifest& files, bool description) {
  uint64_t sum = 0;
  for (const auto& file : files.files()) {
    if (is_description(file) != description) continue;
    std::error_code error;
    uint64_t here = fs::file_size(scratch / file.path(), error);
    if (error) here = 0;
    sum += file.blob().size() - std::min<uint64_t>(here, file.blob().size());
  }
  return sum;
}

std::vector<fs::path> folders_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (entry.is_directory()) found.push_back(entry.path());
  return found;
}

v1::Manifest files_of(const fs::path& folder) {
  auto data = read_file(folder / kFiles, kMaxManifest);
  return data ? read_files(*data) : v1::Manifest();
}

}  // namespace

std::string fetch(const v1::Blob& blob, const fs::path& folder, const Download& download,
                  uint64_t most) {
  check_blob(blob, most);
  if (blob.size() == blob.inline_().size()) return blob.inline_();
  fs::path part = folder / (blob.sha256() + ".part");
  fetch_file(blob, "", part, download);
  std::string data = File(part, O_RDONLY).read(0, blob.size());
  fs::remove(part);
  return data;
}

void drop_parts(const fs::path& folder, const std::set<std::string>& wanted) {
  std::vector<fs::path> old;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".part" && !wanted.count(entry.path().stem().string()))
      old.push_back(entry.path());
  for (const auto& path : old) fs::remove(path);
}

Bundles::Bundles(const fs::path& state, fs::path publisher, const Disk& disk)
    : folder_(state / "bundles"),
      publisher_(std::move(publisher)),
      disk_(disk),
      serials_(state / "serials.json") {
  make_folder(folder_);
}

const Bundle* Bundles::current() {
  if (current_ && stamps(*current_) == stamps_) return &*current_;
  current_.reset();
  auto name = read_file(folder_ / kLast);
  if (name && is_hex(*name, 64)) current_ = open(*name);
  if (!current_) return nullptr;
  stamps_ = stamps(*current_);
  return &*current_;
}

const Bundle& Bundles::fetch(const v1::Blob& manifest, const Download& download, uint64_t free) {
  drop_parts(folder_, {manifest.sha256()});
  check_room(manifest.sha256(), manifest.size(), free);
  std::string data = corolla::fetch(manifest, folder_, download, kMaxManifest);
  v1::Manifest files = read_files(data);
  fs::path found = folder_ / manifest.sha256(), scratch = folder_ / (manifest.sha256() + ".new");
  current_.reset();
  if (auto here = open(manifest.sha256())) {
    serials_.check(publisher_id(publisher_), here->manifest.serial);
  } else {
    if (fs::exists(found) && !fs::exists(scratch)) fs::rename(found, scratch);  // of it, some
    fs::remove_all(found);
    make_folder(scratch);
    write_file(scratch / kFiles, data);
    check_room(manifest.sha256(), lacking(scratch, files, true), free);
    fill(scratch, files, download, true);
    try {
      Manifest told = read_bundle(scratch, publisher_);
      check_same(told, files);
      serials_.check(publisher_id(publisher_), told.serial);
    } catch (const Error&) {
      fs::remove_all(scratch);
      throw;
    }
    reuse(scratch, files);
    check_room(manifest.sha256(), lacking(scratch, files, false), free);
    fill(scratch, files, download, false);
    fs::rename(scratch, found);
  }
  write_file(folder_ / kLast, manifest.sha256());
  if (!current()) throw WireError("the bundle changed while it was fetched");
  drop_others(manifest.sha256());
  return *current_;
}

// The old bundle goes first where the owner's limit has no room for both.
void Bundles::check_room(const std::string& name, uint64_t more, uint64_t free) const {
  if (more > free)
    throw DiskError("the bundle needs " + human_bytes(more) + " more, " + human_bytes(free) +
                    " are free");
  if (more > disk_.room_for(more)) drop_others(name + ".new");
  uint64_t room = disk_.room_for(more);
  if (more > room)
    throw DiskLimit("it needs " + human_bytes(more) + " more on this device's disk, its owner " +
                    "allows " + human_bytes(room) + " (--disk)");
}

// Moves files of equal content here: fetch_file checks them.
void Bundles::reuse(const fs::path& scratch, const v1::Manifest& files) const {
  std::map<std::string, fs::path> known;
  for (const auto& other : folders_in(folder_)) {
    if (other == scratch) continue;
    try {
      v1::Manifest theirs = files_of(other);
      for (const auto& file : theirs.files())
        known[file.blob().sha256()] = other / file.path();
    } catch (const WireError&) {  // not one of ours, or damaged: nothing to gain
    }
  }
  for (const auto& file : files.files()) {
    auto own = known.find(file.blob().sha256());
    fs::path path = scratch / file.path();
    if (own == known.end() || fs::exists(path)) continue;
    make_folder(path.parent_path());
    std::error_code absent;
    fs::rename(own->second, path, absent);
  }
}

std::optional<Bundle> Bundles::open(const std::string& name) const {
  fs::path folder = folder_ / name;
  auto data = read_file(folder / kFiles, kMaxManifest);
  if (!data || sha256(*data) != name) return std::nullopt;
  try {
    v1::Manifest files = read_files(*data);
    for (const auto& file : files.files())
      if (file_sha256(folder / file.path()) != file.blob().sha256()) return std::nullopt;
    Bundle bundle{name, folder, read_bundle(folder, publisher_)};
    check_same(bundle.manifest, files);
    return bundle;
  } catch (const Error&) {  // it is fetched again, and then refused if need be
    return std::nullopt;
  }
}

std::map<std::string, Bundles::Stamp> Bundles::stamps(const Bundle& bundle) const {
  std::map<std::string, Stamp> found;
  v1::Manifest files = files_of(bundle.folder);
  for (const auto& file : files.files()) {
    std::error_code absent;
    fs::path path = bundle.folder / file.path();
    found[file.path()] = {fs::file_size(path, absent), fs::last_write_time(path, absent)};
  }
  return found;
}

void Bundles::drop_others(const std::string& name) const {
  for (const auto& other : folders_in(folder_))
    if (other != folder_ / name) fs::remove_all(other);
}

}  // namespace corolla
