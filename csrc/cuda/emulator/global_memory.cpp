// SPDX-License-Identifier: Apache-2.0
#include "global_memory.h"

#include <sstream>

namespace compressed_linear::cuda::emulator {

GlobalMemory::GlobalMemory(const std::vector<Buffer>& buffers)
    : buffers_(buffers), written_(buffers.size()), constant_(buffers.size()) {}

bool GlobalMemory::locate(const void* data, int bytes, bool write, bool constant, const char* what,
                          uint64_t* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& buffer = buffers_[i];
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data);
    if (at < begin || at + static_cast<uintptr_t>(bytes) > begin + buffer.bytes) continue;
    const uint64_t offset = at - begin;
    if (offset % static_cast<uint64_t>(bytes) != 0) {
      fatal_ = std::string(what) + " of " + std::to_string(bytes) + " bytes at byte " +
               std::to_string(offset) + " of " + buffer.name + " is not aligned";
      return false;
    }
    if (write && !buffer.writable) {
      fatal_ = std::string(what) + " to " + buffer.name + ", which is read only";
      return false;
    }
    if (write) written_[i] = 1;
    if (constant) constant_[i] = 1;
    *address = static_cast<uint64_t>(i) << 48 | offset;
    return true;
  }
  std::ostringstream text;
  text << what << " of " << bytes << " bytes outside of every buffer";
  for (const Buffer& buffer : buffers_) {
    const intptr_t off = static_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(buffer.data);
    if (off > -4096 && off < static_cast<intptr_t>(buffer.bytes) + 4096)
      text << ", at byte " << off << " of " << buffer.name << ", which has " << buffer.bytes;
  }
  fatal_ = text.str();
  return false;
}

std::vector<std::string> GlobalMemory::problems() const {
  std::vector<std::string> found;
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (written_[i] && constant_[i])
      found.push_back("load_constant reads buffer " + buffers_[i].name +
                      ", which the kernel also writes");
  return found;
}

}  // namespace compressed_linear::cuda::emulator
