// What machine.py calls: the numbers of operations, and a launch in one or more orders.

#include <algorithm>
#include <map>

#include "operations.h"

namespace device {

namespace {

struct Table {
  std::map<std::string, s32> numbers{{"bra", BRANCH}, {"ret", RETURN}, {"bar.sync", BARRIER}};
  std::vector<Operation> operations = std::vector<Operation>(N_CONTROLS, nullptr);
};

Table& table() {
  static Table filled;
  return filled;
}

void define_all() {
  if (table().operations.size() > N_CONTROLS) return;
  define_integers(), define_bits(), define_floats(), define_conversions(), define_exchanges();
  define_transfers(), define_matrices(), define_products();
}

const Instruction& last_of(const Launch& launch) { return launch.code[launch.n_instructions - 1]; }

// Run in every order; each must leave the same bytes.
void run_orders(const Launch& launch, Problems& problems) {
  Changes first;
  for (int k = 0; k < launch.n_orders && !problems.any(); k++) {
    Regions regions(launch.regions, launch.n_regions);
    Changes changes;
    const s32* chosen = launch.orders + 2 * k;
    u64 seed = (launch.seed + k) * 2 + 0x9E3779B97F4A7C15;
    Machine machine{launch, regions, problems, changes, Order(chosen[0]), bool(chosen[1]), seed};
    machine.run();
    if (k > 0) {
      u64 address = first.differs_from(changes);
      if (address) machine.report(ORDER_MATTERS, last_of(launch), 0, address);
    }
    if (k + 1 < launch.n_orders && !problems.any()) changes.undo(), first = std::move(changes);
  }
}

}  // namespace

void define(const std::string& name, Operation operation) {
  table().numbers[name] = table().operations.size();
  table().operations.push_back(operation);
}

Operation operation(s32 number) { return table().operations[number]; }

s32 operation_number(const std::string& name) {
  define_all();
  auto found = table().numbers.find(name);
  return found == table().numbers.end() ? -1 : found->second;
}

}  // namespace device

extern "C" int device_operation(const char* name) { return device::operation_number(name); }

// The number of problems that it wrote.
extern "C" int device_launch(const device::Launch* launch) {
  using namespace device;
  Problems problems;
  run_orders(*launch, problems);
  int n = std::min<int>(problems.all().size(), launch->max_problems);
  std::copy_n(problems.all().begin(), n, launch->problems);
  return n;
}
