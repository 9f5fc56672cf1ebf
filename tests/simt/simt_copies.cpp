// Asynchronous copies that land late: what each thread has begun, in groups. SIMT_COPIES=late|early.
#include <cstdlib>
#include <cstring>

#include "simt_device.h"

namespace simt {
namespace {

constexpr unsigned kAtMost = 128;

struct Pending {  // a ring; memory of its own, since what an allocator does is not the kernel's
  Copy copies[kAtMost];
  unsigned first, end, groups;
};
Pending g_pending[1024];  // by thread
bool g_late;

Pending& own() { return g_pending[current->linear]; }

}  // namespace

void forget_copies() {  // of the block before
  const char* variable = std::getenv("SIMT_COPIES");
  g_late = !variable || std::strcmp(variable, "early") != 0;
  for (Pending& pending : g_pending) pending.first = pending.end = pending.groups = 0;
}

bool copies_land_late() { return g_late; }

void note_copy(const Copy& copy) {
  Pending& pending = own();
  if (pending.end - pending.first == kAtMost) fail("more than %u copies of one thread on their way", kAtMost);
  Copy& noted = pending.copies[pending.end++ % kAtMost];
  noted = copy;
  noted.group = pending.groups;
}

void commit_copies() { ++own().groups; }

bool next_copy(unsigned groups_on_their_way, Copy* copy) {
  Pending& pending = own();
  if (pending.first == pending.end) return false;
  const Copy& oldest = pending.copies[pending.first % kAtMost];
  if (oldest.group + groups_on_their_way >= pending.groups) return false;
  *copy = oldest;
  ++pending.first;
  return true;
}

}  // namespace simt
