// SPDX-License-Identifier: Apache-2.0
#include "nodes.h"

#include <cctype>
#include <fstream>

#if defined(__linux__)
#include <sched.h>
#endif

namespace compressed_linear::cpu {

namespace {

constexpr uint8_t kUnknown = kMostNodes - 1;
constexpr int64_t kMostCpus = 1 << 16;

// "0-3,8" as 0, 1, 2, 3, 8; nothing of what does not look like that.
std::vector<int64_t> read_list(const std::string& text) {
  std::vector<int64_t> found;
  const char* at = text.c_str();
  const auto number = [&at]() -> int64_t {
    if (std::isdigit(static_cast<unsigned char>(*at)) == 0) return -1;
    int64_t value = 0;
    for (; std::isdigit(static_cast<unsigned char>(*at)) != 0 && value < kMostCpus; ++at)
      value = 10 * value + (*at - '0');
    return value;
  };
  while (*at != '\0') {
    const int64_t first = number();
    int64_t last = first;
    if (*at == '-') {
      ++at;
      last = number();
    }
    if (first < 0 || last < first || last >= kMostCpus || (*at != ',' && *at != '\0')) return {};
    for (int64_t i = first; i <= last; ++i) found.push_back(i);
    if (*at == ',') ++at;
  }
  return found;
}

std::vector<int64_t> read_list_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return read_list(line);
}

// CPUs that the calling thread may run on.
std::vector<int> own_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int i = 0; i < CPU_SETSIZE; ++i)
    if (CPU_ISSET(i, &set)) cpus.push_back(i);
#endif
  return cpus;
}

struct ThreadNodes {
  const std::vector<uint8_t>* of_cpus = nullptr;
  std::vector<int> of_threads;
};

}  // namespace

std::vector<uint8_t> nodes_of_cpus(const std::string& root) {
  std::vector<uint8_t> nodes;
  int64_t with_cpus = 0;
  for (const int64_t node : read_list_of(root + "/online")) {
    if (node >= kUnknown) return {};
    const std::vector<int64_t> cpus =
        read_list_of(root + "/node" + std::to_string(node) + "/cpulist");
    with_cpus += cpus.empty() ? 0 : 1;
    for (const int64_t cpu : cpus) {
      if (cpu >= static_cast<int64_t>(nodes.size()))
        nodes.resize(static_cast<size_t>(cpu + 1), kUnknown);
      nodes[static_cast<size_t>(cpu)] = static_cast<uint8_t>(node);
    }
  }
  return with_cpus > 1 ? nodes : std::vector<uint8_t>{};
}

int common_node(const std::vector<uint8_t>& nodes, const std::vector<int>& cpus) {
  int node = -1;
  for (const int cpu : cpus) {
    if (static_cast<size_t>(cpu) >= nodes.size() || nodes[static_cast<size_t>(cpu)] == kUnknown)
      return -1;
    if (node >= 0 && node != nodes[static_cast<size_t>(cpu)]) return -1;
    node = nodes[static_cast<size_t>(cpu)];
  }
  return node;
}

const uint8_t* nodes_of_threads(const Parallel& parallel) {
  static const std::vector<uint8_t> of_cpus = nodes_of_cpus("/sys/devices/system/node");
  if (of_cpus.empty() || parallel.threads == 1) return nullptr;
  thread_local std::vector<uint8_t> known;
  thread_local int64_t known_threads = 0;
  if (known_threads != parallel.threads) {
    ThreadNodes found{&of_cpus, std::vector<int>(static_cast<size_t>(parallel.threads), -1)};
    parallel.run(
        parallel.threads,
        [](void* context, int64_t begin, int64_t) {
          auto* to = static_cast<ThreadNodes*>(context);
          to->of_threads[static_cast<size_t>(begin)] = common_node(*to->of_cpus, own_cpus());
        },
        &found);
    known.clear();
    for (const int node : found.of_threads)
      if (node >= 0) known.push_back(static_cast<uint8_t>(node));
    known_threads = parallel.threads;
  }
  return static_cast<int64_t>(known.size()) == parallel.threads ? known.data() : nullptr;
}

}  // namespace compressed_linear::cpu
