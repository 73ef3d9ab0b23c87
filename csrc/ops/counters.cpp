// SPDX-License-Identifier: Apache-2.0
#include "counters.h"

#include <map>
#include <mutex>

namespace compressed_linear {
namespace {

std::mutex mutex;

std::map<std::string, std::atomic<int64_t>>& counters() {
  static auto* map = new std::map<std::string, std::atomic<int64_t>>();
  return *map;
}

}  // namespace

std::atomic<int64_t>& counter(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return counters()[name];
}

std::string describe_calls() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string text;
  for (const auto& [name, count] : counters())
    if (count != 0) text += name + " " + std::to_string(count) + "\n";
  return text;
}

void reset_calls() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [name, count] : counters()) count = 0;
}

}  // namespace compressed_linear
