// SPDX-License-Identifier: Apache-2.0
// Checks of what the emulator reports, for the tests of the emulator.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device/device.h"

using namespace compressed_linear::cuda;
using emulator::Options;
using emulator::Report;

inline int failures = 0;

inline void check(bool good, const std::string& message) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s\n", message.c_str());
}

inline void expect_clean(const char* what, const Report& report) {
  check(report.problem_count == 0,
        std::string(what) + ": expected no problem, got " +
            (report.problems.empty() ? "one without words" : report.problems[0]));
}

inline void expect_problem(const char* what, const Report& report, const char* words) {
  for (const std::string& problem : report.problems)
    if (problem.find(words) != std::string::npos) return;
  check(false, std::string(what) + ": expected a problem with '" + words + "', got " +
                   (report.problems.empty() ? "none" : report.problems[0]));
}

template <class T>
inline emulator::Buffer buffer(const char* name, std::vector<T>& data, bool writable = false) {
  return {data.data(), data.size() * sizeof(T), name, writable};
}

inline int lane() { return thread_index() & 31; }
