#include "base/meter.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <numeric>

namespace corolla {

uint64_t peak_rss() {
  // Where there is /proc: what getrusage tells there begins with the peak of the parent process.
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (!line.rfind("VmHWM:", 0)) return std::stoull(line.substr(6)) * 1024;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#if defined(__APPLE__)
  return static_cast<uint64_t>(usage.ru_maxrss);
#else
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
#endif
}

double quantile(std::vector<double> values, double part) {
  if (values.empty()) return 0;
  const auto at = static_cast<size_t>(part * static_cast<double>(values.size() - 1) + 0.5);
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(at), values.end());
  return values[at];
}

void Meter::report(std::map<std::string, double>& metrics,
                   const std::vector<double>& losses) const {
  metrics["device_step_ms_p50"] = 1e3 * quantile(steps_, 0.5);
  metrics["device_step_ms_p95"] = 1e3 * quantile(steps_, 0.95);
  metrics["device_peak_rss_bytes"] = static_cast<double>(peak_rss());
  metrics["device_seconds"] = seconds();
  const double worked = std::accumulate(steps_.begin(), steps_.end(), 0.0);
  if (perturb_ > 0 && worked > 0) metrics["device_perturb_share"] = perturb_ / worked;
  if (losses.empty()) return;
  metrics["device_loss_first"] = losses.front();
  metrics["device_loss_last"] = losses.back();
}

}  // namespace corolla
