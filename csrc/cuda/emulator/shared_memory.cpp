// SPDX-License-Identifier: Apache-2.0
#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "cuda/device/device.h"

namespace compressed_linear::cuda::emulator {
namespace {

constexpr size_t kMaxProblems = 20;

// Mask of the bytes of word `word` that are in [offset, offset + bytes).
uint8_t covered(uint32_t word, uint32_t offset, int bytes) {
  uint8_t mask = 0;
  for (uint32_t i = 0; i < 4; ++i)
    if (4 * word + i >= offset && 4 * word + i < offset + static_cast<uint32_t>(bytes))
      mask = static_cast<uint8_t>(mask | 1u << i);
  return mask;
}

std::string at(int thread, uint32_t offset) {
  return "thread " + std::to_string(thread) + " at shared byte " + std::to_string(offset);
}

}  // namespace

SharedMemory::SharedMemory(size_t bytes, int threads, bool races)
    : data_(bytes, 0xff),
      words_((bytes + 3) / 4),
      known_(static_cast<size_t>(threads),
             std::make_shared<const std::vector<uint32_t>>(static_cast<size_t>(threads), 0u)),
      time_(static_cast<size_t>(threads), 1),
      races_(races) {}

void SharedMemory::problem(const std::string& text) {
  ++problem_count_;
  if (problems_.size() < kMaxProblems) problems_.push_back(text);
}

bool SharedMemory::inside(int thread, uint32_t address, int bytes, const char* what) {
  const int64_t offset = static_cast<int64_t>(address) - shared_base();
  const bool good = offset >= 0 && offset + bytes <= static_cast<int64_t>(data_.size());
  if (good && offset % bytes == 0) return true;
  fatal_ = "thread " + std::to_string(thread) + ": " + what + " of " + std::to_string(bytes) +
           " bytes at shared byte " + std::to_string(offset) +
           (good ? " is not aligned" : ", there are " + std::to_string(data_.size()));
  return false;
}

bool SharedMemory::before(const Moment& moment, int thread) const {
  return moment.thread < 0 || moment.thread == thread ||
         (*known_[static_cast<size_t>(thread)])[static_cast<size_t>(moment.thread)] >= moment.time;
}

bool SharedMemory::read(int thread, uint32_t address, void* to, int bytes) {
  if (!inside(thread, address, bytes, "load")) return false;
  const uint32_t offset = address - shared_base();
  std::memcpy(to, data_.data() + offset, static_cast<size_t>(bytes));
  for (uint32_t w = offset / 4; 4 * w < offset + static_cast<uint32_t>(bytes); ++w) {
    Word& word = words_[w];
    const uint8_t mask = covered(w, offset, bytes);
    if (word.in_flight & mask)
      problem(at(thread, offset) + " reads bytes of an asynchronous copy before waiting for it");
    else if (mask & ~word.written)
      problem(at(thread, offset) + " reads uninitialized bytes");
    if (!races_) continue;
    for (int i = 0; i < 4; ++i)
      if (mask >> i & 1 && !before(word.writers[i], thread)) {
        problem(at(thread, offset) + " reads what thread " +
                std::to_string(word.writers[i].thread) + " wrote, with no barrier between");
        break;
      }
    const auto same = std::find_if(word.readers.begin(), word.readers.end(),
                                   [&](const Reader& r) { return r.moment.thread == thread; });
    const Moment now = {thread, time_[static_cast<size_t>(thread)]};
    if (same == word.readers.end())
      word.readers.push_back({now, mask});
    else
      *same = {now, static_cast<uint8_t>(same->bytes | mask)};
  }
  return true;
}

void SharedMemory::check_write(int thread, uint32_t offset, int bytes, const char* what) {
  for (uint32_t w = offset / 4; 4 * w < offset + static_cast<uint32_t>(bytes); ++w) {
    Word& word = words_[w];
    const uint8_t mask = covered(w, offset, bytes);
    if (word.in_flight & mask)
      problem(at(thread, offset) + std::string(what) + " while an asynchronous copy is in flight");
    if (!races_) continue;
    for (int i = 0; i < 4; ++i)
      if (mask >> i & 1 && !before(word.writers[i], thread)) {
        problem(at(thread, offset) + what + " what thread " +
                std::to_string(word.writers[i].thread) + " wrote, with no barrier between");
        break;
      }
    for (const Reader& reader : word.readers)
      if (reader.bytes & mask && !before(reader.moment, thread)) {
        problem(at(thread, offset) + what + " what thread " + std::to_string(reader.moment.thread) +
                " read, with no barrier between");
        break;
      }
  }
}

void SharedMemory::mark_written(int thread, uint32_t offset, int bytes) {
  for (uint32_t w = offset / 4; 4 * w < offset + static_cast<uint32_t>(bytes); ++w) {
    Word& word = words_[w];
    const uint8_t mask = covered(w, offset, bytes);
    word.written = static_cast<uint8_t>(word.written | mask);
    word.in_flight = static_cast<uint8_t>(word.in_flight & ~mask);
    for (int i = 0; i < 4; ++i)
      if (mask >> i & 1) word.writers[i] = {thread, time_[static_cast<size_t>(thread)]};
    // Earlier reads of these bytes happened before this write, or have been reported.
    for (Reader& reader : word.readers) reader.bytes = static_cast<uint8_t>(reader.bytes & ~mask);
    word.readers.erase(std::remove_if(word.readers.begin(), word.readers.end(),
                                      [](const Reader& reader) { return reader.bytes == 0; }),
                       word.readers.end());
  }
}

bool SharedMemory::write(int thread, uint32_t address, const void* from, int bytes) {
  if (!inside(thread, address, bytes, "store")) return false;
  const uint32_t offset = address - shared_base();
  check_write(thread, offset, bytes, " overwrites");
  std::memcpy(data_.data() + offset, from, static_cast<size_t>(bytes));
  mark_written(thread, offset, bytes);
  return true;
}

bool SharedMemory::begin_copy(int thread, uint32_t address, int bytes) {
  if (!inside(thread, address, bytes, "asynchronous copy")) return false;
  const uint32_t offset = address - shared_base();
  check_write(thread, offset, bytes, " copies over");
  for (uint32_t w = offset / 4; 4 * w < offset + static_cast<uint32_t>(bytes); ++w)
    words_[w].in_flight = static_cast<uint8_t>(words_[w].in_flight | covered(w, offset, bytes));
  return true;
}

void SharedMemory::end_copy(int thread, uint32_t address, const void* from, int bytes) {
  const uint32_t offset = address - shared_base();
  if (from == nullptr)
    std::memset(data_.data() + offset, 0, static_cast<size_t>(bytes));
  else
    std::memcpy(data_.data() + offset, from, static_cast<size_t>(bytes));
  mark_written(thread, offset, bytes);
}

void SharedMemory::synchronize(const std::vector<int>& threads) {
  if (!races_) return;
  auto joined = std::make_shared<std::vector<uint32_t>>(*known_[static_cast<size_t>(threads[0])]);
  const void* last = known_[static_cast<size_t>(threads[0])].get();
  for (const int thread : threads) {
    const auto& known = known_[static_cast<size_t>(thread)];
    // Lanes of a warp often share a clock.
    if (known.get() == last) continue;
    last = known.get();
    for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*known)[i]);
  }
  for (const int thread : threads)
    (*joined)[static_cast<size_t>(thread)] = time_[static_cast<size_t>(thread)]++;
  const std::shared_ptr<const std::vector<uint32_t>> shared = std::move(joined);
  for (const int thread : threads) known_[static_cast<size_t>(thread)] = shared;
}

}  // namespace compressed_linear::cuda::emulator
