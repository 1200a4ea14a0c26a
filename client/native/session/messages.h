// What phones and gateways say to each other (proto/device.proto): its limits, read in one place.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "corolla/proto/device.pb.h"

namespace corolla {

constexpr uint32_t kProtocol = 1;
constexpr uint64_t kChunk = 1 << 20;
constexpr int kMaxMessage = 2 << 20;
constexpr uint64_t kMaxTask = 8 << 20;
constexpr uint64_t kMaxPayload = 1 << 30;
constexpr uint64_t kMaxManifest = 16 << 20;    // of a bundle of 512 GiB
constexpr uint64_t kMaxDescription = 16 << 20;  // manifest.json
constexpr uint64_t kSignature = 64;             // manifest.sig
constexpr int kMaxFiles = 1024;
constexpr uint64_t kMaxChunks = 1 << 16;
constexpr int kMaxCached = 4096;
constexpr int kMaxRows = 1 << 16;     // of a log
constexpr int kMaxScalarGroups = 64;

// What the gateway sends breaks a rule of the protocol.
class WireError : public Error {
 public:
  using Error::Error;
};

bool is_device(const std::string& name);

// All of these throw WireError; those that read a message count its entries first.
void check_id(const std::string& text);                     // 32 hexadecimal characters
void check_blob(const v1::Blob& blob, uint64_t most);       // sizes, and what is inline
void check_chunk(const v1::Chunk& chunk, uint64_t offset, uint64_t size);
v1::Manifest read_files(const std::string& data);           // paths stay in their folder
v1::Task read_task(const std::string& header);
v1::CheckInResponse read_answer(std::string_view data);  // to a check-in

v1::Chunk make_chunk(const std::string& content, uint64_t offset, uint64_t size,
                     const std::string& lease);

// The reply to a task that was not done.
v1::Reply given_up(const v1::Task& task, const std::string& client, const std::string& why);

}  // namespace corolla
