#include "tools/serve.h"

#include <fcntl.h>
#include <sys/file.h>

#include <csignal>
#include <cstdio>

#include "base/files.h"
#include "base/platform.h"

namespace corolla {
namespace {

Stop* signalled = nullptr;

extern "C" void on_signal(int) { signalled->set(); }

// SIGTERM and SIGINT end what is done within a step, for as long as this lives.
class Signals {
 public:
  explicit Signals(Stop& stop) {
    signalled = &stop;
    struct sigaction action{};
    action.sa_handler = on_signal;
    ::sigaction(SIGTERM, &action, nullptr);
    ::sigaction(SIGINT, &action, nullptr);
    ::signal(SIGPIPE, SIG_IGN);
  }
  ~Signals() {
    ::signal(SIGTERM, SIG_DFL);
    ::signal(SIGINT, SIG_DFL);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;
};

void say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

std::unique_ptr<Platform> platform(const Options& options) {
  const std::string script = "script:";
  if (options.platform == "linux") return linux_platform(options.state);
  if (options.platform.rfind(script, 0) != 0)
    throw UsageError("--platform: expected linux or script:FILE, found '" +
                     one_line(options.platform) + "'");
  try {
    return script_platform(options.platform.substr(script.size()), options.state);
  } catch (const Error& error) {
    throw UsageError(std::string("--platform: ") + error.what());
  }
}

}  // namespace

int guarded(const std::function<void()>& work) {
  try {
    work();
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

void serve(const Options& options, uint64_t examples, const std::vector<std::string>& strategies,
           const std::string& runtime, const Hire& hire) {
  Stop stop;
  Signals signals(stop);
  File lock(options.state / "lock", O_RDWR | O_CREAT);
  if (::flock(lock.descriptor(), LOCK_EX | LOCK_NB) < 0)
    throw UsageError("another corolla-phone is at work in " + options.state.string() +
                     ": give this one its own --state");
  auto senses = platform(options);
  Channel channel(options.gateway, options.roots, options.token);
  Owner owner{options.name,   options.state,   options.publisher, examples,
              options.memory, options.methods, strategies,        options.length,
              runtime,        options.limits,  options.disk,      options.keep_updates};
  Session session(owner, channel, options.pauses, *senses, hire, stop, say);
  try {
    say(options.name + " has " + std::to_string(examples) + " examples, asks " + options.gateway);
    session.run(options.rounds, options.once);
  } catch (const Stopped&) {
    say("stopped");
  }
}

}  // namespace corolla
