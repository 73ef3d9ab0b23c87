// SPDX-License-Identifier: Apache-2.0
// How often each path of each op has run, so that tests can hold a plan against what happened.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace compressed_linear {

// The counter called `name`; lives for ever, so a caller may keep the reference.
std::atomic<int64_t>& counter(const std::string& name);

// "name count" lines of the counters that are not zero.
std::string describe_calls();

void reset_calls();

}  // namespace compressed_linear
