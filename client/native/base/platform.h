// What a device senses of itself: all that differs between Linux, Android and iOS.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

namespace corolla {

// What holds now. Where a system cannot tell, it says what lets the device work: the policy of a
// gateway is no protection against a device that does not know.
struct Readings {
  bool charging = true;          // what has no battery is charging, at 100 %
  uint32_t battery_percent = 100;
  uint32_t thermal = 0;          // 0 (none), 1 (light) to 6 (shutdown) as Android counts
  bool metered = false;          // network that costs by volume
  bool idle = true;              // nobody is using the device
  uint64_t storage_bytes = 0;    // free, where the state lies
  uint64_t memory_bytes = 0;     // that this process may still take
};

// Implementers:
//   Android  BatteryManager (isCharging, BATTERY_PROPERTY_CAPACITY), PowerManager
//            (getCurrentThermalStatus, isInteractive), ConnectivityManager.isActiveNetworkMetered,
//            ActivityManager.MemoryInfo (availMem - threshold), StatFs.getAvailableBytes
//   iOS      UIDevice.batteryState and batteryLevel, ProcessInfo.thermalState (nominal 0, fair 1,
//            serious 3, critical 4), NWPath.isExpensive, os_proc_available_memory(),
//            volumeAvailableCapacityForImportantUsage; idle: while a BGProcessingTask runs
class Platform {
 public:
  virtual ~Platform() = default;
  // Asked twice a second while the device trains, from any thread, one at a time: must not block.
  // Throws nothing.
  virtual Readings read() = 0;
};

// By /sys and /proc; `state` is on the disk that counts.
std::unique_ptr<Platform> linux_platform(const std::filesystem::path& state);

// By a file of lines {"after": seconds, "charging": false, ...} with the names of Readings: what is
// said to hold from so many seconds after the start on, on top of the lines before. Read again when
// it changes. What it does not name is as nobody would mind; storage and memory are as found here.
// Throws Error naming the line that cannot be read.
std::unique_ptr<Platform> script_platform(const std::filesystem::path& file,
                                          const std::filesystem::path& state);

}  // namespace corolla
