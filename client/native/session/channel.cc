#include "session/channel.h"

#include <grpcpp/generic/generic_stub.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "base/files.h"
#include "session/messages.h"

namespace corolla {
namespace {

constexpr double kMostPatience = 240;  // seconds for a chunk, on the slowest line

std::string code_name(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::UNAVAILABLE: return "UNAVAILABLE";
    case grpc::StatusCode::DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::RESOURCE_EXHAUSTED: return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::CANCELLED: return "CANCELLED";
    case grpc::StatusCode::INTERNAL: return "INTERNAL";
    default: return "code " + std::to_string(static_cast<int>(code));
  }
}

constexpr char kCheckIn[] = "/corolla.v1.Phones/CheckIn";

bool on_loopback(const std::string& address) {
  std::string host = address.substr(0, address.rfind(':'));
  const std::string own = ".localhost";
  bool named = host == "localhost" ||
               (host.size() > own.size() &&
                host.compare(host.size() - own.size(), own.size(), own) == 0);
  return named || host.rfind("127.", 0) == 0 || host == "[::1]" || host == "::1";
}

// The library has no code of its own for it.
bool wrong_certificate(const std::string& details) {
  std::string lower = details;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return c == '_' ? ' ' : std::tolower(c); });
  return lower.find("certificate verify failed") != std::string::npos ||
         lower.find("peer name") != std::string::npos;
}

}  // namespace

Channel::Channel(const std::string& address, const std::string& roots, std::string token)
    : authorization_("Bearer " + std::move(token)) {
  ::setenv("GRPC_VERBOSITY", "NONE", 0);  // what went wrong is told in one line, by who calls
  grpc::SslCredentialsOptions tls;
  tls.pem_root_certs = roots;
  grpc::ChannelArguments options;
  options.SetMaxReceiveMessageSize(kMaxMessage);
  options.SetMaxSendMessageSize(kMaxMessage);
  options.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 10000);
  options.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // these are ours
  if (on_loopback(address)) options.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  line_ = grpc::CreateCustomChannel(address, grpc::SslCredentials(tls), options);
  stub_ = v1::Phones::NewStub(line_);
}

grpc::Status Channel::check_in(grpc::ClientContext& context, const v1::CheckInRequest& request,
                               v1::CheckInResponse* response) {
  grpc::TemplatedGenericStub<v1::CheckInRequest, grpc::ByteBuffer> stub(line_);
  grpc::CompletionQueue queue;
  auto call = stub.PrepareUnaryCall(&context, kCheckIn, request, &queue);
  grpc::ByteBuffer came;
  grpc::Status status;
  call->StartCall();
  call->Finish(&came, &status, this);
  void* tag = nullptr;
  bool good = false;
  queue.Next(&tag, &good);
  down_ += came.Length();
  grpc::Slice bytes;
  if (!status.ok() || !came.DumpToSingleSlice(&bytes).ok()) return status;
  *response = read_answer({reinterpret_cast<const char*>(bytes.begin()), bytes.size()});
  return status;
}

void Channel::prepare(grpc::ClientContext& context, double seconds) const {
  double sound = seconds > 0 ? std::min(seconds, kMostPatience) : 0;
  auto span = std::chrono::milliseconds(static_cast<int64_t>(sound * 1000));
  context.set_deadline(std::chrono::system_clock::now() + span);
  context.AddMetadata("authorization", authorization_);
}

double Caller::jitter(double low, double high) {
  thread_local std::mt19937 generator{std::random_device{}()};
  return std::uniform_real_distribution<double>(low, std::nextafter(high, high + 1))(generator);
}

void Caller::failed(const grpc::Status& status, Moment deadline, bool slow, double& pause,
                    double& seconds) {
  std::string details = one_line(status.error_message());
  grpc::StatusCode code = status.error_code();
  if (code == grpc::StatusCode::UNAUTHENTICATED || code == grpc::StatusCode::UNIMPLEMENTED)
    throw UsageError("the gateway refuses: " + details);
  if (wrong_certificate(details))
    throw UsageError(
        "the gateway's certificate is not signed by --root-certificates, or is of another host or "
        "time");
  if (code == grpc::StatusCode::NOT_FOUND || code == grpc::StatusCode::INVALID_ARGUMENT)
    throw Over(details);
  if (code == grpc::StatusCode::DEADLINE_EXCEEDED) {
    if (slow) throw Slow("a call took too long");
    seconds = std::min(2 * seconds, kMostPatience);
  }
  if (in_seconds(pause) > deadline)
    throw NoAnswer("no connection before the deadline: " + code_name(code));
  tell_("no answer, trying again: " + code_name(code));
  Resting wait(spending_);
  stop_.wait(pause * jitter(0.5, 1.5));
  pause = std::min(2 * pause, pauses_.longest);
}

}  // namespace corolla
