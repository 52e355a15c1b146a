#include "emulator/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/observer.h"
#include "emulator/sanitizer.h"
#include "emulator/symbols.h"
#include "portable/vec.h"

namespace pyvitfast::emulator {

Execution execution{};

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kDefaultShared = 48 * 1024;
constexpr std::size_t kMaxShared = 227 * 1024;
// What sm_80, the smallest of the default architectures, grants on opting in.
constexpr std::size_t kOptInShared = 163 * 1024;
constexpr std::size_t kMaxParameterBytes = 32764;
constexpr std::size_t kStackBytes = (PYVITFAST_ASAN ? 512 : 192) * 1024;
constexpr std::size_t kPageBytes = 4096;

// A multiple of the 128 bytes that the banks span, so that guards do not shift arrays among banks.
constexpr std::size_t kGuardBytes = 128;
constexpr std::size_t kArenaBytes = kMaxShared + 64 * kGuardBytes;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating point type
// Not the poison: -1 and NaN are likely to be written by mistake too. As a float it is -2.6e36.
constexpr unsigned char kGuard = 0xFB;

// Without waiting in between; a kernel that does more waits for what never comes.
constexpr unsigned kMostAtomics = 50'000'000;
constexpr std::size_t kMaxArrays = 60;
constexpr unsigned kMaxCopies = 256;  // of one thread in flight
constexpr unsigned kMaxGroups = 256;

enum class Order { forward, reverse, random };

struct Settings {
    Order order = Order::forward;
    std::uint64_t seed = 0;
    bool copy_at_issue = true;
    bool count = false;
    bool check_races = false;
    std::size_t max_shared = kOptInShared;
};

constexpr std::array kSettingNames = {"ORDER", "SEED", "ASYNC", "COUNT", "RACECHECK", "MAX_SHARED"};

std::map<std::string, std::string>& overrides() {
    static std::map<std::string, std::string> values;
    return values;
}

[[noreturn]] void bad_setting(const std::string& name, const std::string& value) {
    throw std::invalid_argument("emulator setting " + name + ": \"" + value +
                                "\" is not a value it has");
}

void apply_setting(Settings& s, const std::string& name, const std::string& value) {
    auto number = [&] {
        std::uint64_t result = 0;
        const auto [end, error] =
            std::from_chars(value.data(), value.data() + value.size(), result);
        if (error != std::errc{} || end != value.data() + value.size()) {
            bad_setting(name, value);
        }
        return result;
    };
    auto choice = [&](std::initializer_list<const char*> names) {
        const auto found = std::find(names.begin(), names.end(), value);
        if (found == names.end()) {
            bad_setting(name, value);
        }
        return static_cast<int>(found - names.begin());
    };
    if (name == "ORDER") {
        s.order = static_cast<Order>(choice({"forward", "reverse", "random"}));
    } else if (name == "SEED") {
        s.seed = number();
    } else if (name == "ASYNC") {
        s.copy_at_issue = choice({"issue", "wait"}) == 0;
    } else if (name == "COUNT") {
        s.count = choice({"0", "1"}) == 1;
    } else if (name == "RACECHECK") {
        s.check_races = choice({"0", "1"}) == 1;
    } else if (name == "MAX_SHARED") {
        s.max_shared = number();
        if (s.max_shared > kMaxShared) {
            bad_setting(name, value);
        }
    }
}

Settings read_settings() {
    Settings result;
    for (const char* name : kSettingNames) {
        const auto found = overrides().find(name);
        if (found != overrides().end()) {
            apply_setting(result, name, found->second);
        } else if (const char* value =
                       std::getenv((std::string("PYVITFAST_EMULATOR_") + name).c_str())) {
            apply_setting(result, name, value);
        }
    }
    return result;
}

class Random {
   public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {  // splitmix64
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    std::uint64_t below(std::uint64_t n) { return next() % n; }

   private:
    std::uint64_t state_;
};

enum class Status : std::uint8_t { ready, at_barrier, at_warp_operation, exited };

struct Thread : ThreadContext {
    Status status;
    Place place;            // of the operation it waits in
    const char* operation;  // its name
    unsigned mask;
    void* data;
    Fiber fiber;
    // Copies not yet made, in order of issue, as a ring. Positions only grow. Nothing here is
    // allocated by the fiber: ThreadSanitizer would see fibers of two blocks share the heap block.
    std::array<AsyncCopy, kMaxCopies> copies;
    std::array<unsigned, kMaxGroups> group_ends;  // positions, as a ring
    unsigned first_copy, issued, due;
    unsigned first_group, groups;
};

// Computes the results of all lanes of a warp operation.
using Collective = void (*)(void* const* lane_data, unsigned mask);

// A warp operation for which lanes still have to arrive.
struct Pending {
    Collective collective;
    const char* operation;
    Place place;
    unsigned mask;
    unsigned arrived;
};

struct Warp {
    unsigned exists = 0;
    unsigned ready = 0;
    unsigned pending_count = 0;
    std::array<Pending, 32> pending;
    char sync_token;
};

struct SharedArray {
    const void* declaration;
    const char* name;
    std::size_t offset;
    std::size_t bytes;
};

bool same_place(Place a, Place b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string to_text(Place place) {
    std::string file = place.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

std::string to_text(Index i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
}

std::string ranges(const std::vector<unsigned>& numbers) {
    std::string text;
    unsigned shown = 0;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) {
            ++last;
        }
        if (++shown > 8) {
            return text + ", ...";
        }
        text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
        if (last > i) {
            text += "-" + std::to_string(numbers[last]);
        }
        i = last + 1;
    }
    return text;
}

std::string hexadecimal(unsigned value) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%08x", value);
    return text;
}

char* map_memory(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        throw EmulatorError("emulator: no memory for stacks");
    }
    return static_cast<char*>(p);
}

// Lives as long as the process: stacks are large and their pages are worth keeping.
struct Machine {
    std::mutex lock;
    Settings settings;
    std::unordered_map<const void*, std::size_t> opted_in;
    std::unordered_map<const void*, std::string> names;

    std::string kernel;
    Place launch_place;
    void (*run)(void*);
    void* call;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    unsigned thread_count = 0;
    unsigned atomics = 0;  // of the running thread, since it was resumed
    unsigned exited = 0;
    unsigned at_barrier = 0;
    unsigned barrier_parity = 0;
    Fiber scheduler;
    std::exception_ptr error;
    char* stacks = nullptr;
    unsigned stack_count = 0;

    char* arena = nullptr;
    std::vector<unsigned char> valid;  // by byte of the arena: 1 + index of the array it is in
    std::vector<SharedArray> arrays;   // the first is the dynamic one
    std::size_t arena_used = 0;
    std::size_t static_bytes = 0;
    std::size_t shared_limit = 0;

    char barrier_tokens[2];
    char launch_token;
};

Machine& machine() {
    static Machine* instance = new Machine;
    return *instance;
}

Thread& current() { return *const_cast<Thread*>(static_cast<const Thread*>(execution.thread)); }

std::string context(const Machine& m) {
    return "emulator: kernel " + m.kernel + " (launched at " + to_text(m.launch_place) + ")";
}

[[noreturn]] void fail_text(const std::string& what, Place place) {
    if (execution.thread == nullptr) {
        throw EmulatorError("emulator: " + to_text(place) + ": " + what);
    }
    throw EmulatorError(context(machine()) + ", " + to_text(place) + ", block " +
                        to_text(execution.block_index) + ", thread " +
                        to_text(execution.thread->index) + ": " + what);
}

void switch_to_scheduler(Thread& thread) { thread.fiber.switch_to(machine().scheduler); }

void fiber_main() {
    Fiber::started();
    Machine& m = machine();
    Thread& thread = current();
    try {
        m.run(m.call);
    } catch (...) {
        m.error = std::current_exception();
    }
    thread.status = Status::exited;
    m.warps[thread.warp].ready &= ~(1u << thread.lane);
    ++m.exited;
    tsan_release(&m.launch_token);
    thread.fiber.switch_to(m.scheduler, true);
    std::abort();  // an exited fiber is never resumed
}

void reserve_stacks(Machine& m, unsigned count) {
    // ThreadSanitizer would report the reuse of a stack by another fiber as a race; fresh memory
    // is clean.
    if (m.stacks != nullptr && (PYVITFAST_TSAN || m.stack_count < count)) {
        munmap(m.stacks, m.stack_count * kStackBytes);
        m.stacks = nullptr;
    }
    if (m.stacks == nullptr) {
        m.stacks = map_memory(count * kStackBytes);
        m.stack_count = count;
        for (unsigned i = 0; i < count; ++i) {  // an overflow stops at an unmapped page
            mprotect(m.stacks + i * kStackBytes, kPageBytes, PROT_NONE);
        }
    }
}

std::size_t rounded_up(std::size_t bytes) {
    return (bytes + kGuardBytes - 1) / kGuardBytes * kGuardBytes;
}

// The bytes between an array and the next one.
std::size_t guard_bytes(const SharedArray& array) {
    return rounded_up(array.bytes) + kGuardBytes - array.bytes;
}

void write_guard(Machine& m, std::size_t offset, std::size_t bytes) {
    std::memset(m.arena + offset, kGuard, bytes);
    asan_poison(m.arena + offset, bytes);
}

SharedArray& add_shared_array(Machine& m, const void* declaration, const char* name,
                              std::size_t bytes) {
    m.arrays.push_back({declaration, name, m.arena_used, bytes});
    SharedArray& array = m.arrays.back();
    write_guard(m, array.offset + bytes, guard_bytes(array));
    m.arena_used += rounded_up(bytes) + kGuardBytes;
    std::memset(m.valid.data() + array.offset, static_cast<int>(m.arrays.size()), bytes);
    return array;
}

void map_arena(Machine& m) {
    if (m.arena != nullptr && PYVITFAST_TSAN) {
        munmap(m.arena, kArenaBytes);
        m.arena = nullptr;
    }
    if (m.arena == nullptr) {
        m.arena = map_memory(kArenaBytes);
    }
    asan_unpoison(m.arena, kArenaBytes);
    std::memset(m.arena, kPoison, kArenaBytes);
}

void begin_arena(Machine& m, std::size_t dynamic_bytes) {
    map_arena(m);
    m.valid.assign(kArenaBytes, 0);
    m.arrays.clear();
    m.arrays.reserve(kMaxArrays);
    m.static_bytes = 0;
    m.arena_used = kGuardBytes;
    write_guard(m, 0, kGuardBytes);
    add_shared_array(m, nullptr, "dynamic shared memory", dynamic_bytes);
}

// Arrays keep their places from block to block, but not their contents.
void poison_arena(Machine& m) {
    if (PYVITFAST_TSAN) {
        map_arena(m);
        write_guard(m, 0, kGuardBytes);
    }
    for (const SharedArray& array : m.arrays) {
        std::memset(m.arena + array.offset, kPoison, array.bytes);
        if (PYVITFAST_TSAN) {
            write_guard(m, array.offset + array.bytes, guard_bytes(array));
        }
    }
}

// Writes that did not go through the wrappers; AddressSanitizer reports them itself, at once.
void check_guards(const Machine& m) {
    if (PYVITFAST_ASAN) {
        return;
    }
    auto check = [&](std::size_t offset, std::size_t bytes, const std::string& where) {
        for (std::size_t i = 0; i < bytes; ++i) {
            if (static_cast<unsigned char>(m.arena[offset + i]) != kGuard) {
                throw EmulatorError(context(m) + ", block " + to_text(execution.block_index) +
                                    ": a write out of bounds, " + where);
            }
        }
    };
    check(0, kGuardBytes, "before the start of shared memory");
    for (const SharedArray& array : m.arrays) {
        check(array.offset + array.bytes, guard_bytes(array),
              "after the end of " + std::string(array.name) + " (" + std::to_string(array.bytes) +
                  " bytes), found when the block had ended");
    }
}

std::vector<unsigned> missing_lanes(const Machine& m, unsigned warp, unsigned mask) {
    std::vector<unsigned> lanes;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1u) != 0 && (m.warps[warp].exists >> lane & 1u) == 0) {
            lanes.push_back(lane);
        }
    }
    return lanes;
}

// Nothing can run, and not all threads have exited or stand at one barrier.
[[noreturn]] void fail_deadlock(const Machine& m) {
    struct Group {
        const Thread* first;
        std::vector<unsigned> threads;
    };
    std::vector<Group> groups;
    bool in_warp_operation = false;
    for (unsigned i = 0; i < m.thread_count; ++i) {
        const Thread& t = m.threads[i];
        in_warp_operation |= t.status == Status::at_warp_operation;
        auto same = [&](const Group& g) {
            if (g.first->status != t.status) {
                return false;
            }
            return t.status == Status::exited ||
                   (g.first->operation == t.operation && g.first->mask == t.mask &&
                    same_place(g.first->place, t.place));
        };
        auto found = std::find_if(groups.begin(), groups.end(), same);
        if (found == groups.end()) {
            groups.push_back({&t, {}});
            found = groups.end() - 1;
        }
        found->threads.push_back(i);
    }
    std::string text = context(m) + ", block " + to_text(execution.block_index) + ": deadlock, " +
                       (in_warp_operation ? "a warp operation waits for lanes that do not come"
                                          : "sync_threads is not reached by all threads") +
                       ": ";
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const Thread& t = *groups[i].first;
        text += (i == 0 ? "threads " : "; threads ") + ranges(groups[i].threads);
        if (t.status == Status::exited) {
            text += " have exited";
            continue;
        }
        text += std::string(" wait in ") + t.operation + " at " + to_text(t.place);
        if (t.status == Status::at_warp_operation) {
            text += " with mask " + hexadecimal(t.mask);
            const auto missing = missing_lanes(m, t.warp, t.mask);
            if (!missing.empty()) {
                text += " (lanes " + ranges(missing) + " of warp " + std::to_string(t.warp) +
                        " do not exist)";
            }
        }
    }
    throw EmulatorError(text);
}

// Runs one lane until it waits or exits.
void run_lane(Machine& m, unsigned warp, unsigned lane) {
    Thread& thread = m.threads[warp * 32 + lane];
    execution.thread = &thread;
    m.atomics = 0;
    m.scheduler.switch_to(thread.fiber);
    execution.thread = nullptr;
    if (m.error != nullptr) {
        tsan_acquire(&m.launch_token);
        std::rethrow_exception(m.error);
    }
}

unsigned pick_lane(unsigned ready, Order order, Random& random) {
    switch (order) {
        case Order::forward:
            return static_cast<unsigned>(std::countr_zero(ready));
        case Order::reverse:
            return 31u - static_cast<unsigned>(std::countl_zero(ready));
        case Order::random:
            break;
    }
    for (auto skip = random.below(static_cast<unsigned>(std::popcount(ready))); skip > 0; --skip) {
        ready &= ready - 1;
    }
    return static_cast<unsigned>(std::countr_zero(ready));
}

// Lets each warp run as far as it gets before the next one: that finds more missing barriers than
// running the warps in step.
void run_warps(Machine& m, Random& random) {
    const Order order = m.settings.order;
    const auto warp_count = static_cast<unsigned>(m.warps.size());
    std::vector<unsigned> warps(warp_count);
    std::iota(warps.begin(), warps.end(), 0u);
    if (order == Order::reverse) {
        std::reverse(warps.begin(), warps.end());
    }
    bool any_ready = true;
    while (any_ready) {
        any_ready = false;
        if (order == Order::random) {
            for (unsigned i = warp_count; i > 1; --i) {
                std::swap(warps[i - 1], warps[random.below(i)]);
            }
        }
        for (const unsigned w : warps) {
            while (m.warps[w].ready != 0) {
                run_lane(m, w, pick_lane(m.warps[w].ready, order, random));
                // Now and then leave a warp half way, as a GPU may.
                if (order == Order::random && random.below(64) == 0) {
                    break;
                }
            }
            any_ready |= m.warps[w].ready != 0;
        }
    }
}

void begin_block(Machine& m) {
    if (PYVITFAST_TSAN) {
        reserve_stacks(m, m.thread_count);
    }
    poison_arena(m);
    m.exited = 0;
    m.at_barrier = 0;
    m.barrier_parity = 0;
    for (Warp& warp : m.warps) {
        warp.pending_count = 0;
        warp.ready = warp.exists;
    }
    for (unsigned i = 0; i < m.thread_count; ++i) {
        Thread& thread = m.threads[i];
        thread.status = Status::ready;
        thread.first_copy = thread.issued = thread.due = 0;
        thread.first_group = thread.groups = 0;
        char* stack = m.stacks + i * kStackBytes;
        // The entry frame is never left, so its red zones stay behind.
        asan_unpoison(stack + kPageBytes, kStackBytes - kPageBytes);
        thread.fiber.create(stack + kPageBytes, kStackBytes - kPageBytes, fiber_main);
    }
}

void end_block(Machine& m) {
    for (unsigned i = 0; i < m.thread_count; ++i) {
        m.threads[i].fiber.destroy();
    }
}

void run_block(Machine& m, Random& random) {
    for (;;) {
        run_warps(m, random);
        if (m.exited == m.thread_count) {
            return;
        }
        const Thread& first = m.threads[0];
        const bool together =
            m.at_barrier == m.thread_count &&
            std::all_of(m.threads.begin(), m.threads.begin() + m.thread_count,
                        [&](const Thread& t) { return same_place(t.place, first.place); });
        if (!together) {
            fail_deadlock(m);
        }
        if (execution.observed) {
            observer_barrier();
        }
        m.at_barrier = 0;
        m.barrier_parity ^= 1u;
        for (unsigned i = 0; i < m.thread_count; ++i) {
            m.threads[i].status = Status::ready;
        }
        for (Warp& warp : m.warps) {
            warp.ready = warp.exists;
        }
    }
}

void check_launch(const Machine& m, const LaunchRequest& request, std::size_t opted_in) {
    auto reject = [&](const std::string& what) { throw EmulatorError(context(m) + ": " + what); };
    const auto [gx, gy, gz] = request.grid;
    const auto [bx, by, bz] = request.block;
    if (gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
        reject("the grid must be within (1..2147483647, 1..65535, 1..65535), got " +
               to_text(request.grid));
    }
    if (bx == 0 || by == 0 || bz == 0 || bx > 1024 || by > 1024 || bz > 64 ||
        std::uint64_t{bx} * by * bz > kMaxThreads) {
        reject("the block must have 1 to 1024 threads, within (1024, 1024, 64), got " +
               to_text(request.block));
    }
    if (request.dynamic_shared_bytes > std::max(opted_in, kDefaultShared)) {
        reject("dynamic shared memory must be at most " +
               std::to_string(std::max(opted_in, kDefaultShared)) +
               " bytes (allow_dynamic_shared raises it), got " +
               std::to_string(request.dynamic_shared_bytes));
    }
    if (request.parameter_bytes > kMaxParameterBytes) {
        reject("kernel parameters must be at most " + std::to_string(kMaxParameterBytes) +
               " bytes, got " + std::to_string(request.parameter_bytes));
    }
}

void set_up_threads(Machine& m, Index size) {
    m.thread_count = size.x * size.y * size.z;
    if (m.threads.size() < m.thread_count) {
        m.threads = std::vector<Thread>(m.thread_count);
    }
    m.warps.assign((m.thread_count + 31) / 32, {});
    for (unsigned i = 0; i < m.thread_count; ++i) {
        Thread& thread = m.threads[i];
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.linear = i;
        thread.lane = i % 32;
        thread.warp = i / 32;
        m.warps[i / 32].exists |= 1u << (i % 32);
    }
    if (!PYVITFAST_TSAN) {
        reserve_stacks(m, m.thread_count);
    }
}

// Position i of the order in which n blocks run.
std::uint64_t block_at(std::uint64_t i, std::uint64_t n, Order order, std::uint64_t stride,
                       std::uint64_t start) {
    switch (order) {
        case Order::forward:
            return i;
        case Order::reverse:
            return n - 1 - i;
        case Order::random:
            break;
    }
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(stride) * i + start) % n);
}

void run_grid(Machine& m, const LaunchRequest& request) {
    const auto [gx, gy, gz] = request.grid;
    const std::uint64_t blocks = std::uint64_t{gx} * gy * gz;
    Random random(m.settings.seed);
    // A stride without a common factor with the number of blocks visits each block once.
    std::uint64_t stride = 1 + random.below(blocks);
    while (std::gcd(stride, blocks) != 1) {
        ++stride;
    }
    const std::uint64_t start = random.below(blocks);
    for (std::uint64_t i = 0; i < blocks; ++i) {
        const std::uint64_t block = block_at(i, blocks, m.settings.order, stride, start);
        execution.block_index = {static_cast<unsigned>(block % gx),
                                 static_cast<unsigned>(block / gx % gy),
                                 static_cast<unsigned>(block / gx / gy)};
        begin_block(m);
        if (execution.observed) {
            observer_begin_block(block);
        }
        try {
            run_block(m, random);
            check_guards(m);
        } catch (...) {
            end_block(m);
            throw;
        }
        end_block(m);
        if (execution.observed) {
            observer_end_block();
        }
    }
}

// Waits until all lanes of the mask have come; the last one computes the results of all.
void warp_operation(Collective collective, void* data, unsigned mask, const char* operation,
                    Place place) {
    Machine& m = machine();
    Thread& thread = current();
    Warp& warp = m.warps[thread.warp];
    const unsigned bit = 1u << thread.lane;
    if ((mask & bit) == 0) {
        fail_text(std::string(operation) + ": mask " + hexadecimal(mask) +
                      " does not name the calling lane " + std::to_string(thread.lane),
                  place);
    }
    unsigned slot = 0;
    while (slot < warp.pending_count &&
           !(warp.pending[slot].mask == mask && warp.pending[slot].operation == operation &&
             same_place(warp.pending[slot].place, place))) {
        ++slot;
    }
    Pending& pending = warp.pending[slot];
    if (slot == warp.pending_count) {
        pending = {collective, operation, place, mask, 0};
        ++warp.pending_count;
    }
    pending.arrived |= bit;
    thread.data = data;
    if (pending.arrived != mask) {
        thread.status = Status::at_warp_operation;
        thread.operation = operation;
        thread.place = place;
        thread.mask = mask;
        warp.ready &= ~bit;
        switch_to_scheduler(thread);
        return;
    }
    pending = warp.pending[--warp.pending_count];
    if (collective != nullptr) {
        std::array<void*, 32> lane_data{};
        for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
            const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
            lane_data[lane] = m.threads[thread.warp * 32 + lane].data;
        }
        collective(lane_data.data(), mask);
    } else if (execution.observed) {
        observer_warp_barrier(thread.warp);
    }
    for (unsigned lanes = mask & ~bit; lanes != 0; lanes &= lanes - 1) {
        m.threads[thread.warp * 32 + static_cast<unsigned>(std::countr_zero(lanes))].status =
            Status::ready;
    }
    warp.ready |= mask;
}

struct ShuffleLane {
    std::uint64_t value, result;
    unsigned source;
};

struct BallotLane {
    bool predicate;
    unsigned result;
};

std::string address_text(const void* address) {
    char text[32];
    std::snprintf(text, sizeof(text), "%p", address);
    return text;
}

const char* name_of(Access access) {
    switch (access) {
        case Access::global_load:
            return "global load";
        case Access::global_store:
            return "global store";
        case Access::global_atomic:
            return "atomic operation";
        case Access::shared_load:
            return "shared load";
        case Access::shared_store:
            return "shared store";
    }
    return "";
}

}  // namespace

void count_atomic(Place place) {
    if (++machine().atomics > kMostAtomics) {
        fail_text("more than " + std::to_string(kMostAtomics) +
                      " atomic operations without a barrier: the thread spins, maybe on another "
                      "block, which need not run at the same time",
                  place);
    }
}

void fail_global(const void* address, std::size_t alignment, Access access, Place place) {
    const auto value = reinterpret_cast<std::uintptr_t>(address);
    fail_text(value < 4096 ? std::string(name_of(access)) + " through a null pointer"
                           : "misaligned " + std::string(name_of(access)) + ": address " +
                                 address_text(address) + " is not a multiple of " +
                                 std::to_string(alignment),
              place);
}

void fail_shared(const void* address, std::size_t bytes, std::size_t alignment, Access access,
                 Place place) {
    const Machine& m = machine();
    const std::string name = name_of(access);
    if ((reinterpret_cast<std::uintptr_t>(address) & (alignment - 1)) != 0) {
        fail_text("misaligned " + name + ": address " + address_text(address) +
                      " is not a multiple of " + std::to_string(alignment),
                  place);
    }
    const auto offset =
        reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(m.arena);
    if (m.arena == nullptr || offset >= kArenaBytes) {
        fail_text(name + " of an address that is not in shared memory", place);
    }
    std::string text = name + " of " + std::to_string(bytes) + " bytes out of bounds";
    for (const SharedArray& array : m.arrays) {
        if (offset + bytes > array.offset &&
            offset < array.offset + array.bytes + guard_bytes(array)) {
            text += ": at byte " + std::to_string(offset - array.offset) + " of " + array.name +
                    ", which has " + std::to_string(array.bytes);
        }
    }
    fail_text(text, place);
}

void observe(Access access, const void* address, unsigned bytes, Place place) {
    // Atomics on shared memory are rare, and neither kind of sector or bank model fits them.
    if (execution.thread == nullptr ||
        (access == Access::global_atomic && is_shared(address, bytes))) {
        return;
    }
    const std::string race = observer_access(access, address, bytes, place, *execution.thread);
    if (!race.empty()) {
        fail_text(race, place);
    }
}

bool is_shared(const void* address, std::size_t bytes) {
    const Machine& m = machine();
    const auto offset =
        reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(m.arena);
    return offset < kArenaBytes - bytes && m.valid[offset] != 0 &&
           m.valid[offset] == m.valid[offset + bytes - 1];
}

void* static_shared(const void* declaration, const char* name, std::size_t bytes, Place place) {
    Machine& m = machine();
    for (const SharedArray& array : m.arrays) {
        if (array.declaration == declaration) {
            return m.arena + array.offset;
        }
    }
    m.static_bytes += bytes;
    if (m.static_bytes > kDefaultShared || m.arrays.size() == kMaxArrays) {
        fail_text("static shared memory must be at most 49152 bytes in 60 arrays, got " +
                      std::to_string(m.static_bytes) + " bytes with " + name,
                  place);
    }
    if (m.static_bytes + m.arrays[0].bytes > m.shared_limit) {
        fail_text("static and dynamic shared memory together must be at most " +
                      std::to_string(m.shared_limit) + " bytes, got " +
                      std::to_string(m.static_bytes + m.arrays[0].bytes),
                  place);
    }
    return m.arena + add_shared_array(m, declaration, name, bytes).offset;
}

void* dynamic_shared(Place place) {
    const Machine& m = machine();
    if (m.arrays[0].bytes == 0) {
        fail_text("the kernel uses dynamic shared memory but was launched with none", place);
    }
    return m.arena + m.arrays[0].offset;
}

void sync_threads(Place place) {
    Machine& m = machine();
    Thread& thread = current();
    char* token = &m.barrier_tokens[m.barrier_parity];
    thread.status = Status::at_barrier;
    thread.operation = "sync_threads";
    thread.place = place;
    thread.mask = 0;
    ++m.at_barrier;
    m.warps[thread.warp].ready &= ~(1u << thread.lane);
    tsan_release(token);
    switch_to_scheduler(thread);
    tsan_acquire(token);
}

void sync_warp(unsigned mask, Place place) {
    char* token = &machine().warps[current().warp].sync_token;
    tsan_release(token);
    warp_operation(nullptr, nullptr, mask, "sync_warp", place);
    tsan_acquire(token);
}

void thread_fence() {
    if (execution.observed) {
        observer_fence();
    }
}

unsigned ballot(bool predicate, unsigned mask, const char* operation, Place place) {
    BallotLane lane{predicate, 0};
    warp_operation(
        [](void* const* lane_data, unsigned lanes) {
            unsigned result = 0;
            for (unsigned i = 0; i < 32; ++i) {
                if ((lanes >> i & 1u) != 0 && static_cast<BallotLane*>(lane_data[i])->predicate) {
                    result |= 1u << i;
                }
            }
            for (unsigned i = 0; i < 32; ++i) {
                if ((lanes >> i & 1u) != 0) {
                    static_cast<BallotLane*>(lane_data[i])->result = result;
                }
            }
        },
        &lane, mask, operation, place);
    return lane.result;
}

std::uint64_t shuffle(std::uint64_t value, unsigned source, unsigned mask, const char* operation,
                      Place place) {
    if ((mask >> source & 1u) == 0) {
        fail_text(std::string(operation) + " reads lane " + std::to_string(source) +
                      ", which mask " + hexadecimal(mask) + " does not name",
                  place);
    }
    ShuffleLane lane{value, 0, source};
    warp_operation(
        [](void* const* lane_data, unsigned lanes) {
            for (; lanes != 0; lanes &= lanes - 1) {
                auto* to = static_cast<ShuffleLane*>(lane_data[std::countr_zero(lanes)]);
                to->result = static_cast<ShuffleLane*>(lane_data[to->source])->value;
            }
        },
        &lane, mask, operation, place);
    return lane.result;
}

void load_matrices(MatrixRows& lane, Place place) {
    warp_operation(
        [](void* const* lane_data, unsigned) {
            auto half_word = [&](unsigned matrix, unsigned row, unsigned column) {
                const auto* from = static_cast<MatrixRows*>(lane_data[matrix * 8 + row]);
                return from->row[column / 2] >> (column % 2 * 16) & 0xffffu;
            };
            for (unsigned i = 0; i < 32; ++i) {
                auto* to = static_cast<MatrixRows*>(lane_data[i]);
                const unsigned group = i / 4;
                const unsigned pair = i % 4 * 2;
                for (unsigned matrix = 0; matrix < 4; ++matrix) {
                    to->result[matrix] = to->transposed
                                             ? half_word(matrix, pair, group) |
                                                   half_word(matrix, pair + 1, group) << 16
                                             : half_word(matrix, group, pair) |
                                                   half_word(matrix, group, pair + 1) << 16;
                }
            }
        },
        &lane, 0xffffffffu, "ldmatrix", place);
}

namespace {

void multiply_warp(void* const* lane_data, unsigned) {
    const bool bfloat16 = static_cast<MatrixMultiply*>(lane_data[0])->bfloat16;
    auto decode = [&](std::uint32_t word, unsigned half) {
        const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
        return bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
    };
    float a[16][16], b[16][8], c[16][8];
    // Fragment layouts of mma.m16n8k16 in the PTX ISA: a lane holds pairs of neighbouring columns
    // of A (rows of B), and the registers step through the 8 x 8 quadrants.
    for (unsigned i = 0; i < 32; ++i) {
        const auto& lane = *static_cast<MatrixMultiply*>(lane_data[i]);
        const unsigned group = i / 4;
        const unsigned pair = i % 4 * 2;
        for (unsigned half = 0; half < 2; ++half) {
            for (unsigned r = 0; r < 4; ++r) {
                a[group + r % 2 * 8][pair + half + r / 2 * 8] = decode(lane.a[r], half);
            }
            for (unsigned r = 0; r < 2; ++r) {
                b[pair + half + r * 8][group] = decode(lane.b[r], half);
            }
            for (unsigned r = 0; r < 2; ++r) {
                c[group + r * 8][pair + half] = lane.accumulator[r * 2 + half];
            }
        }
    }
    for (unsigned row = 0; row < 16; ++row) {
        for (unsigned k = 0; k < 16; ++k) {
            for (unsigned column = 0; column < 8; ++column) {
                c[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (unsigned i = 0; i < 32; ++i) {
        auto& lane = *static_cast<MatrixMultiply*>(lane_data[i]);
        for (unsigned r = 0; r < 4; ++r) {
            lane.accumulator[r] = c[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
        }
    }
}

}  // namespace

void multiply_matrices(MatrixMultiply& lane, Place place) {
    warp_operation(multiply_warp, &lane, 0xffffffffu, "mma", place);
}

namespace {

thread_local bool launching = false;

struct LaunchingFlag {
    LaunchingFlag() { launching = true; }
    ~LaunchingFlag() { launching = false; }
};

}  // namespace

bool copies_at_issue() { return machine().settings.copy_at_issue; }

void async_push(const AsyncCopy& copy) {
    Thread& thread = current();
    if (thread.issued - thread.first_copy == kMaxCopies) {
        fail_text(
            "more than " + std::to_string(kMaxCopies) + " cp.async of one thread are in flight",
            copy.place);
    }
    thread.copies[thread.issued++ % kMaxCopies] = copy;
}

void async_commit(Place place) {
    Thread& thread = current();
    if (thread.groups - thread.first_group == kMaxGroups) {
        fail_text("more than " + std::to_string(kMaxGroups) + " cp.async groups are in flight",
                  place);
    }
    thread.group_ends[thread.groups++ % kMaxGroups] = thread.issued;
}

void async_limit_groups(unsigned groups) {
    Thread& thread = current();
    while (thread.groups - thread.first_group > groups) {
        thread.due = thread.group_ends[thread.first_group++ % kMaxGroups];
    }
}

bool async_pop(AsyncCopy& copy) {
    Thread& thread = current();
    if (thread.first_copy == thread.due) {
        return false;
    }
    copy = thread.copies[thread.first_copy++ % kMaxCopies];
    return true;
}

void allow_dynamic_shared(const void* kernel, std::size_t bytes) {
    Machine& m = machine();
    const std::lock_guard guard(m.lock);
    const std::size_t limit = read_settings().max_shared;
    if (bytes > limit) {
        throw EmulatorError("emulator: kernel " + function_name(kernel) +
                            ": allow_dynamic_shared must be given at most " +
                            std::to_string(limit) + " bytes, got " + std::to_string(bytes));
    }
    m.opted_in[kernel] = bytes;
}

void launch(const LaunchRequest& request) {
    Machine& m = machine();
    if (launching) {
        throw EmulatorError("emulator: " + to_text(request.place) + ": a kernel called launch");
    }
    const std::lock_guard guard(m.lock);
    const LaunchingFlag flag;
    m.settings = read_settings();
    m.launch_place = request.place;
    m.kernel = m.names.try_emplace(request.kernel).first->second;
    if (m.kernel.empty()) {
        m.kernel = function_name(request.kernel);
        if (m.kernel.empty()) {
            m.kernel = to_text(request.place);
        }
        m.names[request.kernel] = m.kernel;
    }
    const auto opted_in = m.opted_in.find(request.kernel);
    const std::size_t allowed = opted_in == m.opted_in.end() ? 0 : opted_in->second;
    check_launch(m, request, allowed);

    m.run = request.run;
    m.call = request.call;
    m.error = nullptr;
    m.shared_limit = allowed > 0 ? m.settings.max_shared : kDefaultShared;
    set_up_threads(m, request.block);
    begin_arena(m, request.dynamic_shared_bytes);
    m.scheduler.adopt_current();
    execution = {.thread = nullptr,
                 .block_index = {},
                 .block_size = request.block,
                 .grid_size = request.grid,
                 .observed = m.settings.count || m.settings.check_races};
    if (execution.observed) {
        observer_begin_launch(
            m.kernel, {m.settings.count, m.settings.check_races}, m.arena, kArenaBytes,
            std::uint64_t{request.grid.x} * request.grid.y * request.grid.z, m.thread_count);
    }
    std::exception_ptr error;
    try {
        run_grid(m, request);
    } catch (const EmulatorError&) {
        error = std::current_exception();
    } catch (const std::exception& e) {
        error = std::make_exception_ptr(
            EmulatorError(context(m) + ", block " + to_text(execution.block_index) +
                          ": the kernel threw an exception: " + e.what()));
    }
    m.error = nullptr;
    if (execution.observed) {
        observer_end_launch();
    }
    execution = {};
    tsan_acquire(&m.launch_token);
    if (error != nullptr) {
        std::rethrow_exception(error);
    }
}

}  // namespace pyvitfast::emulator

namespace pyvitfast {

void emulator_configure(const std::string& name, const std::string& value) {
    emulator::Machine& m = emulator::machine();
    const std::lock_guard guard(m.lock);
    const auto& names = emulator::kSettingNames;
    if (std::find(names.begin(), names.end(), name) == names.end()) {
        throw std::invalid_argument("emulator setting " + name + ": there is no such setting");
    }
    if (value.empty()) {
        emulator::overrides().erase(name);
        return;
    }
    emulator::Settings checked;
    emulator::apply_setting(checked, name, value);
    emulator::overrides()[name] = value;
}

void emulator_reset_counters() {
    const std::lock_guard guard(emulator::machine().lock);
    emulator::observer_reset();
}

std::string emulator_counters_json() {
    const std::lock_guard guard(emulator::machine().lock);
    return emulator::observer_json();
}

}  // namespace pyvitfast
