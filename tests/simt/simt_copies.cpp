// Asynchronous copies that land late: what each thread has begun, in groups. SIMT_COPIES=late|early.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "simt_device.h"

namespace simt {
namespace {

struct Pending {
  std::deque<Copy> copies;
  unsigned groups = 0;
};
std::vector<Pending> g_pending(1024);  // by thread
bool g_late;

Pending& own() { return g_pending[static_cast<size_t>(current->linear)]; }

}  // namespace

void forget_copies() {  // of the block before
  const char* variable = std::getenv("SIMT_COPIES");
  g_late = !variable || std::strcmp(variable, "early") != 0;
  for (Pending& pending : g_pending) pending.copies.clear(), pending.groups = 0;
}

bool copies_land_late() { return g_late; }

void note_copy(const Copy& copy) {
  own().copies.push_back(copy);
  own().copies.back().group = own().groups;
}

void commit_copies() { ++own().groups; }

bool next_copy(unsigned groups_on_their_way, Copy* copy) {
  Pending& pending = own();
  if (pending.copies.empty() || pending.copies.front().group + groups_on_their_way >= pending.groups)
    return false;
  *copy = pending.copies.front();
  pending.copies.pop_front();
  return true;
}

}  // namespace simt
