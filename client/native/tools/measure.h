// What steps of training cost on this device.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "training/bundle.h"
#include "training/data.h"

namespace corolla {

struct Measured {
  double step_ms_p50 = 0, step_ms_p95 = 0, step_ms_min = 0;
  double perturb_share = 0;  // of a zeroth-order step: all passes over the adapter
  double loss_first = 0, loss_last = 0;
  uint64_t peak_rss_bytes = 0;
};

// `steps` steps of one sequence each with a fresh adapter: SGD for "grad", two-sided differences
// for "loss". Without data, the sequence is of `length` tokens that count up. 0 threads: two, or as
// many as there are.
Measured measure(const Manifest& manifest, const std::filesystem::path& bundle,
                 const std::string& program, const std::string& method, int length, int steps,
                 int threads, const Data* data);

}  // namespace corolla
