// What a program of this client does besides its work: signals, exit codes, one line of error.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "session/session.h"
#include "tools/options.h"

namespace corolla {

// Runs `work`: 0, or 1 and 2 (UsageError) after one line on stderr.
int guarded(const std::function<void()>& work);

// The device of these options until a signal, for so many rounds, or once. `examples`, `strategies`
// and `runtime` are those of who is hired. Throws UsageError, Error.
void serve(const Options& options, uint64_t examples, const std::vector<std::string>& strategies,
           const std::string& runtime, const Hire& hire);

}  // namespace corolla
