// SPDX-License-Identifier: Apache-2.0
// Primitives that access memory. They are not inlined, since the return address is the access's
// site.
#include <cstring>
#include <utility>

#include "machine.h"

namespace compressed_linear::cuda::emulator {

__attribute__((noinline)) void read_shared(uint32_t address, void* to, int bytes) {
  Machine& m = *machine;
  Thread& me = m.self();
  if (!me.block->shared->read(me.at.thread, address, to, bytes)) m.stop(me.block->shared->fatal());
  m.log(__builtin_return_address(0), Kind::shared_load, address, bytes);
}

__attribute__((noinline)) void write_shared(uint32_t address, const void* from, int bytes) {
  Machine& m = *machine;
  Thread& me = m.self();
  if (!me.block->shared->write(me.at.thread, address, from, bytes))
    m.stop(me.block->shared->fatal());
  m.log(__builtin_return_address(0), Kind::shared_store, address, bytes);
}

__attribute__((noinline)) void read_global(const void* from, void* to, int bytes, bool constant) {
  Machine& m = *machine;
  const uint64_t address = m.locate(from, bytes, false, constant, "load");
  std::memcpy(to, from, static_cast<size_t>(bytes));
  m.log(__builtin_return_address(0), Kind::global_load, address, bytes);
}

__attribute__((noinline)) void write_global(void* to, const void* from, int bytes) {
  Machine& m = *machine;
  const uint64_t address = m.locate(to, bytes, true, false, "store");
  std::memcpy(to, from, static_cast<size_t>(bytes));
  m.log(__builtin_return_address(0), Kind::global_store, address, bytes);
  m.progress();
}

__attribute__((noinline)) void copy_async(uint32_t shared, const void* global, int bytes,
                                          bool valid) {
  Machine& m = *machine;
  Thread& me = m.self();
  const void* site = __builtin_return_address(0);
  if (valid)
    m.log(static_cast<const char*>(site) + 1, Kind::global_copy,
          m.locate(global, bytes, false, false, "copy_async"), bytes);
  if (!me.block->shared->begin_copy(me.at.thread, shared, bytes)) m.stop(me.block->shared->fatal());
  m.log(site, Kind::shared_copy, shared, bytes);
  me.open.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
  Thread& me = machine->self();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void copy_async_wait(int left) {
  Thread& me = machine->self();
  while (static_cast<int>(me.groups.size()) > left) {
    for (const Copy& copy : me.groups.front())
      me.block->shared->end_copy(me.at.thread, copy.shared, copy.valid ? copy.global : nullptr,
                                 copy.bytes);
    me.groups.pop_front();
  }
}

int atomic_add(int* to, int value) {
  Machine& m = *machine;
  m.locate(to, 4, true, false, "atomic_add");
  const int old = *to;
  *to = old + value;
  m.progress();
  return old;
}

int load_acquire(const int* from) {
  Machine& m = *machine;
  m.locate(from, 4, false, false, "load_acquire");
  // Other threads run, among them those that it waits for.
  m.wait(State::spinning, "a loop around load_acquire");
  return *from;
}

}  // namespace compressed_linear::cuda::emulator
