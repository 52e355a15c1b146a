#include "emulator/observer.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace pyvitfast::emulator {
namespace {

constexpr unsigned kSectorBytes = 32;
constexpr unsigned kBankBytes = 4;
constexpr unsigned kBanks = 32;
constexpr unsigned kAccessKinds = 5;
constexpr const char* kAccessNames[kAccessKinds] = {"global_load", "global_store", "global_atomic",
                                                    "shared_load", "shared_store"};

bool on_shared(Access access) {
    return access == Access::shared_load || access == Access::shared_store;
}
bool writes(Access access) {
    return access == Access::global_store || access == Access::global_atomic ||
           access == Access::shared_store;
}

struct Totals {
    std::uint64_t requests = 0;
    std::uint64_t bytes_requested = 0;
    std::uint64_t transactions = 0;        // sectors, or wavefronts of shared memory
    std::uint64_t least_transactions = 0;  // with perfect coalescing, or without bank conflicts

    void add(const Totals& other) {
        requests += other.requests;
        bytes_requested += other.bytes_requested;
        transactions += other.transactions;
        least_transactions += other.least_transactions;
    }
};

struct SiteKey {
    std::string_view file;
    int line;
    Access access;
    unsigned bytes;
    auto operator<=>(const SiteKey&) const = default;
};

struct KernelCounters {
    std::uint64_t launches = 0, blocks = 0, threads = 0;
    std::map<SiteKey, Totals> sites;
};

// One warp instruction: what its lanes asked for.
struct Request {
    std::uint32_t lanes = 0;
    std::array<std::uintptr_t, 32> address;
};

// The requests that the lanes of one warp make at one place. A lane's n-th access there belongs to
// the n-th request: lanes run one after the other, so they never stand at an instruction together.
struct SiteLog {
    std::array<std::uint32_t, 32> seen{};
    std::vector<Request> requests;
};

struct Site {
    const char* file = nullptr;
    int line = 0;
    Access access{};
    unsigned bytes = 0;
    Totals totals;
    std::vector<SiteLog> warps;
};

struct Visit {
    std::uint32_t owner = 0;  // block (global memory) or thread (shared memory) plus one; 0 is none
    std::uint32_t epoch = 0;
    std::uint32_t warp_epoch = 0;
    bool atomic = false;
    const Site* site = nullptr;
};
struct ShadowByte {
    Visit write;
    Visit read[2];  // by different owners: one of them is not the next writer
};
constexpr std::size_t kPageBytes = 4096;
using ShadowPage = std::array<ShadowByte, kPageBytes>;

// What a block has made visible to others: writes up to `fenced` by an atomic after a fence.
struct BlockOrder {
    std::uint32_t epoch = 1;      // grows with each fence
    std::uint32_t published = 0;  // writes before this epoch were published
    bool acquired = false;        // has done an atomic, after which it may read published data
};

struct Observer {
    ObserverSettings settings;
    std::map<std::string, KernelCounters> kernels;

    KernelCounters* kernel = nullptr;
    std::vector<std::unique_ptr<Site>> sites;
    std::array<Site*, 512> site_cache;
    unsigned warps = 0;
    std::uint32_t block = 0;
    std::uint32_t barriers = 0;
    std::vector<std::uint32_t> warp_barriers;
    const char* shared_base = nullptr;
    std::vector<ShadowByte> shared_shadow;
    std::unordered_map<std::uintptr_t, std::unique_ptr<ShadowPage>> global_shadow;
    std::uintptr_t last_page_number = 0;
    ShadowPage* last_page = nullptr;
    std::unordered_map<std::uint32_t, BlockOrder> block_order;
};

Observer& observer() {
    static Observer instance;
    return instance;
}

Site& find_site(Observer& o, Access access, unsigned bytes, Place place) {
    const auto hash = (reinterpret_cast<std::uintptr_t>(place.file) >> 3) * 31 +
                      static_cast<unsigned>(place.line) * 40503u +
                      static_cast<unsigned>(access) * 97u + bytes * 7u;
    Site*& cached = o.site_cache[hash % o.site_cache.size()];
    auto matches = [&](const Site& s) {
        return s.file == place.file && s.line == place.line && s.access == access &&
               s.bytes == bytes;
    };
    if (cached != nullptr && matches(*cached)) {
        return *cached;
    }
    for (auto& site : o.sites) {
        if (matches(*site)) {
            return *(cached = site.get());
        }
    }
    o.sites.push_back(std::make_unique<Site>());
    cached = o.sites.back().get();
    cached->file = place.file;
    cached->line = place.line;
    cached->access = access;
    cached->bytes = bytes;
    cached->warps.resize(o.warps);
    return *cached;
}

unsigned count_distinct(std::uintptr_t* values, unsigned count) {
    std::sort(values, values + count);
    return static_cast<unsigned>(std::unique(values, values + count) - values);
}

void add_global(const Request& request, Site& site) {
    std::uintptr_t sectors[64];
    unsigned count = 0;
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((request.lanes >> lane & 1u) == 0) {
            continue;
        }
        ++lanes;
        const std::uintptr_t first = request.address[lane] / kSectorBytes;
        const std::uintptr_t last = (request.address[lane] + site.bytes - 1) / kSectorBytes;
        // Neighbouring lanes mostly share a sector: skip what was just noted.
        if (count == 0 || sectors[count - 1] != first) {
            sectors[count++] = first;
        }
        if (last != first) {
            sectors[count++] = last;
        }
    }
    site.totals.requests += 1;
    site.totals.bytes_requested += std::uint64_t{lanes} * site.bytes;
    site.totals.transactions += count_distinct(sectors, count);
    site.totals.least_transactions += (lanes * site.bytes + kSectorBytes - 1) / kSectorBytes;
}

// A wavefront serves each bank once. 8-byte accesses go by half warps, 16-byte ones by quarters;
// lanes that read the same word share it.
void add_shared(const Request& request, Site& site) {
    const unsigned group = site.bytes <= 4 ? 32 : site.bytes == 8 ? 16 : 8;
    unsigned lanes = 0;
    for (unsigned start = 0; start < 32; start += group) {
        std::uintptr_t words[128];
        unsigned count = 0;
        for (unsigned lane = start; lane < start + group; ++lane) {
            if ((request.lanes >> lane & 1u) == 0) {
                continue;
            }
            ++lanes;
            for (unsigned byte = 0; byte < site.bytes; byte += kBankBytes) {
                words[count++] = (request.address[lane] + byte) / kBankBytes;
            }
        }
        if (count == 0) {
            continue;
        }
        count = count_distinct(words, count);
        std::array<unsigned, kBanks> bank_words{};
        for (unsigned i = 0; i < count; ++i) {
            ++bank_words[words[i] % kBanks];
        }
        site.totals.transactions += *std::max_element(bank_words.begin(), bank_words.end());
        site.totals.least_transactions += (count + kBanks - 1) / kBanks;
    }
    site.totals.requests += 1;
    site.totals.bytes_requested += std::uint64_t{lanes} * site.bytes;
}

void flush(Observer& o) {
    for (auto& site : o.sites) {
        for (SiteLog& log : site->warps) {
            for (const Request& request : log.requests) {
                on_shared(site->access) ? add_shared(request, *site) : add_global(request, *site);
            }
            log.requests.clear();
            log.seen.fill(0);
        }
    }
}

void count_access(Site& site, std::uintptr_t address, const ThreadContext& thread) {
    SiteLog& log = site.warps[thread.warp];
    const std::uint32_t n = log.seen[thread.lane]++;
    if (n >= log.requests.size()) {
        log.requests.resize(n + 1);
    }
    log.requests[n].lanes |= 1u << thread.lane;
    log.requests[n].address[thread.lane] = address;
}

std::string to_text(const Site& site) {
    const std::string file = site.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string describe(const char* memory, const char* unit, bool atomic_mix, const char* first_did,
                     std::uint32_t first_owner, const Site* first_site, const char* second_did) {
    std::string text = std::string("race on ") + memory + " memory: " + unit + " " +
                       std::to_string(first_owner - 1) + " " + first_did + " at " +
                       to_text(*first_site) + ", this " + unit + " " + second_did +
                       " the same address";
    if (atomic_mix) {
        text += " (only one of the two is atomic)";
    }
    return text;
}

// Updates the shadow of one byte. Returns an empty string or the description of a race.
template <typename Concurrent>
std::string visit_byte(ShadowByte& shadow, const Visit& me, const char* memory, const char* unit,
                       Concurrent concurrent) {
    const bool write = writes(me.site->access);
    if (concurrent(shadow.write)) {
        return describe(memory, unit, shadow.write.atomic != me.atomic, "wrote", shadow.write.owner,
                        shadow.write.site, write ? "writes" : "reads");
    }
    if (write) {
        for (const Visit& read : shadow.read) {
            if (concurrent(read)) {
                return describe(memory, unit, false, "read", read.owner, read.site, "writes");
            }
        }
        shadow.write = me;
    } else if (!concurrent(shadow.read[0])) {
        shadow.read[0] = me;
    } else if (!concurrent(shadow.read[1])) {
        shadow.read[1] = me;
    }
    return {};
}

std::string check_shared_race(Observer& o, const Site& site, std::uintptr_t address,
                              const ThreadContext& thread) {
    const std::size_t offset = address - reinterpret_cast<std::uintptr_t>(o.shared_base);
    const Visit me{thread.linear + 1, o.barriers, o.warp_barriers[thread.warp], false, &site};
    auto concurrent = [&](const Visit& other) {
        if (other.owner == 0 || other.owner == me.owner || other.epoch != me.epoch) {
            return false;
        }
        const bool same_warp = (other.owner - 1) / 32 == thread.warp;
        return !same_warp || other.warp_epoch == me.warp_epoch;
    };
    std::string race;
    for (std::size_t i = offset; i < offset + site.bytes && race.empty(); ++i) {
        race = visit_byte(o.shared_shadow[i], me, "shared", "thread", concurrent);
    }
    return race;
}

std::string check_global_race(Observer& o, const Site& site, std::uintptr_t address) {
    const bool atomic = site.access == Access::global_atomic;
    BlockOrder& order = o.block_order[o.block];
    if (atomic) {
        order.published = order.epoch;
        order.acquired = true;
    }
    const Visit me{o.block + 1, order.epoch, 0, atomic, &site};
    // Blocks are unordered, unless the other one published by fence and atomic what this one,
    // after an atomic of its own, now touches.
    auto concurrent = [&](const Visit& other) {
        if (other.owner == 0 || other.owner == me.owner || (other.atomic && atomic)) {
            return false;
        }
        const BlockOrder& theirs = o.block_order[other.owner - 1];
        return !(order.acquired && other.epoch < theirs.published);
    };
    std::string race;
    for (std::uintptr_t a = address; a < address + site.bytes && race.empty(); ++a) {
        if (a / kPageBytes != o.last_page_number || o.last_page == nullptr) {
            auto& page = o.global_shadow[a / kPageBytes];
            if (page == nullptr) {
                page = std::make_unique<ShadowPage>();
            }
            o.last_page_number = a / kPageBytes;
            o.last_page = page.get();
        }
        race = visit_byte((*o.last_page)[a % kPageBytes], me, "global", "block", concurrent);
    }
    return race;
}

void append_totals(std::string& json, const Totals& t, bool shared) {
    json += "\"requests\":" + std::to_string(t.requests) +
            ",\"bytes_requested\":" + std::to_string(t.bytes_requested) + ",\"" +
            (shared ? "wavefronts" : "sectors") + "\":" + std::to_string(t.transactions) +
            ",\"least_" + (shared ? "wavefronts" : "sectors") +
            "\":" + std::to_string(t.least_transactions);
    if (!shared) {
        json += ",\"bytes_moved\":" + std::to_string(t.transactions * kSectorBytes);
    }
}

std::string quoted(std::string_view text) {
    std::string result = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            result += '\\';
        }
        result += c;
    }
    return result + "\"";
}

}  // namespace

void observer_begin_launch(const std::string& kernel, ObserverSettings settings,
                           const void* shared_base, std::size_t shared_bytes, std::uint64_t blocks,
                           unsigned threads_per_block) {
    Observer& o = observer();
    o.settings = settings;
    o.sites.clear();
    o.site_cache.fill(nullptr);
    o.warps = (threads_per_block + 31) / 32;
    o.shared_base = static_cast<const char*>(shared_base);
    o.shared_shadow.resize(shared_bytes);
    o.global_shadow.clear();
    o.last_page = nullptr;
    o.block_order.clear();
    o.kernel = nullptr;
    if (settings.count) {
        o.kernel = &o.kernels[kernel];
        o.kernel->launches += 1;
        o.kernel->blocks += blocks;
        o.kernel->threads += blocks * threads_per_block;
    }
}

void observer_begin_block(std::uint64_t block) {
    Observer& o = observer();
    o.block = static_cast<std::uint32_t>(block);
    // Never reset, so that what the last block did to shared memory is not concurrent.
    o.barriers += 1;
    o.warp_barriers.assign(o.warps, 0);
}

void observer_barrier() {
    Observer& o = observer();
    o.barriers += 1;
    if (o.settings.count) {
        flush(o);
    }
}

void observer_warp_barrier(unsigned warp) { observer().warp_barriers[warp] += 1; }

void observer_fence() {
    Observer& o = observer();
    o.block_order[o.block].epoch += 1;
}

void observer_end_block() {
    if (observer().settings.count) {
        flush(observer());
    }
}

void observer_end_launch() {
    Observer& o = observer();
    if (o.kernel != nullptr) {
        for (const auto& site : o.sites) {
            o.kernel->sites[{site->file, site->line, site->access, site->bytes}].add(site->totals);
        }
    }
    o.kernel = nullptr;
    o.sites.clear();
    o.global_shadow.clear();
}

std::string observer_access(Access access, const void* address, unsigned bytes, Place place,
                            const ThreadContext& thread) {
    Observer& o = observer();
    Site& site = find_site(o, access, bytes, place);
    const auto a = reinterpret_cast<std::uintptr_t>(address);
    if (o.settings.count) {
        count_access(site, a, thread);
    }
    if (o.settings.check_races) {
        return on_shared(access) ? check_shared_race(o, site, a, thread)
                                 : check_global_race(o, site, a);
    }
    return {};
}

void observer_reset() { observer().kernels.clear(); }

std::string observer_json() {
    std::string json = "{\"kernels\":{";
    bool first_kernel = true;
    for (const auto& [name, kernel] : observer().kernels) {
        std::array<Totals, kAccessKinds> totals;
        for (const auto& [key, site] : kernel.sites) {
            totals[static_cast<unsigned>(key.access)].add(site);
        }
        json += (first_kernel ? "" : ",") + quoted(name) +
                ":{\"launches\":" + std::to_string(kernel.launches) +
                ",\"blocks\":" + std::to_string(kernel.blocks) +
                ",\"threads\":" + std::to_string(kernel.threads);
        first_kernel = false;
        std::uint64_t sectors = 0;
        for (unsigned kind = 0; kind < kAccessKinds; ++kind) {
            const bool shared = on_shared(static_cast<Access>(kind));
            sectors += shared ? 0 : totals[kind].transactions;
            json += std::string(",\"") + kAccessNames[kind] + "\":{";
            append_totals(json, totals[kind], shared);
            json += "}";
        }
        json += ",\"bytes_moved\":" + std::to_string(sectors * kSectorBytes) + ",\"sites\":[";
        bool first_site = true;
        for (const auto& [key, site] : kernel.sites) {
            json += std::string(first_site ? "" : ",") + "{\"file\":" + quoted(key.file) +
                    ",\"line\":" + std::to_string(key.line) + ",\"access\":\"" +
                    kAccessNames[static_cast<unsigned>(key.access)] +
                    "\",\"bytes\":" + std::to_string(key.bytes) + ",";
            first_site = false;
            append_totals(json, site, on_shared(key.access));
            json += "}";
        }
        json += "]}";
    }
    return json + "}}";
}

}  // namespace pyvitfast::emulator
