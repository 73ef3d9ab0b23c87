// SPDX-License-Identifier: Apache-2.0
// The buffers of global memory that a kernel may access.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace compressed_linear::cuda::emulator {

class GlobalMemory {
 public:
  explicit GlobalMemory(const std::vector<Buffer>& buffers);

  // Buffer number and offset of an access, in one number. False where it is out of bounds,
  // misaligned or a write to a read-only buffer; `fatal` then describes it. `what` names the
  // primitive.
  bool locate(const void* data, int bytes, bool write, bool constant, const char* what,
              uint64_t* address);
  const std::string& fatal() const { return fatal_; }
  // At the kernel's end: buffers that were written and read by load_constant.
  std::vector<std::string> problems() const;

 private:
  const std::vector<Buffer>& buffers_;
  std::vector<char> written_, constant_;
  std::string fatal_;
};

}  // namespace compressed_linear::cuda::emulator
