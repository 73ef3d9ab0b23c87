// SPDX-License-Identifier: Apache-2.0
// The NUMA nodes of threads, so that they leave each other's weights alone (claims.h).
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace compressed_linear::cpu {

// The node of each CPU by the files node<i>/cpulist under `root`, as Linux has them in
// /sys/devices/system/node. Empty for one node, and where this cannot be told.
std::vector<uint8_t> nodes_of_cpus(const std::string& root);

// The one node of some CPUs, or -1 where they lie on several or on none that is known.
int common_node(const std::vector<uint8_t>& nodes, const std::vector<int>& cpus);

// The node of each thread of the pool, which only threads that are bound to one have; null where
// they are not, or where this machine has one node. Found once for each number of threads.
const uint8_t* nodes_of_threads(const Parallel& parallel);

}  // namespace compressed_linear::cpu
