// Reads the class maps that `knet-deploy run SOURCE --raw shm:NAME` writes into shared memory.
//
//     g++ -std=c++17 -O2 -o read_masks read_masks.cpp
//     ./read_masks NAME        # one line a mask: sequence number, frame, size, pixels per class
//
// Linux. The layout is in docs/reference/outputs.md: a ring of slots that one process writes and any
// number read. Nobody waits for anybody: the newest mask that is whole is taken, a slow reader misses
// some, and the CRC tells a whole mask from one that was written over meanwhile.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#pragma pack(push, 1)
struct Ring {  // the first 64 bytes
    char magic[4];  // KNR1
    std::uint32_t process, slots, state;
    std::uint64_t slot_bytes, written;
    char unused[32];
};
struct Header {  // before the pixels of a slot, 64 bytes
    char magic[4];  // KNM1
    std::uint16_t flags, pixel_bytes;
    std::uint32_t height, width;
    std::uint64_t sequence, frame;
    double pts, wall;
    std::uint32_t crc;
    char unused[12];
};
#pragma pack(pop)
static_assert(sizeof(Ring) == 64 && sizeof(Header) == 64, "the layout has no gaps");

enum State : std::uint32_t { live, ended, replaced };

struct Mask {
    Header header;
    std::vector<std::uint8_t> pixels;  // height × width × pixel_bytes, row by row, little-endian
};

std::uint32_t crc32(const std::vector<std::uint8_t>& bytes) {
    static const auto table = [] {
        std::array<std::uint32_t, 256> made{};
        for (std::uint32_t i = 0; i < 256; ++i) {
            std::uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
            made[i] = value;
        }
        return made;
    }();
    std::uint32_t crc = 0xFFFFFFFFu;
    for (const auto byte : bytes) crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8;
    return ~crc;
}

class Reader {
public:
    explicit Reader(const std::string& name) : path_("/dev/shm/" + name) {
        if (!attach()) throw std::runtime_error("there are no shared masks " + name + "; start the run that writes them first");
    }
    ~Reader() { detach(); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Whether nothing follows: the writer has closed it, or was killed.
    bool at_end() const {
        // A larger one is there within a second, or has come and gone.
        if (missing_) return std::chrono::steady_clock::now() - *missing_ > std::chrono::seconds(1);
        struct stat status {};
        const auto state = head().state;
        return state == ended || (fstat(file_, &status) == 0 && status.st_nlink == 0 && state != replaced);
    }

    // The newest mask that was not taken yet, or nothing.
    std::optional<Mask> newest() {
        const Ring now = head();
        if (now.state == replaced) {  // by a larger one of the same name
            if (!attach() && !missing_) missing_ = std::chrono::steady_clock::now();
            return {};
        }
        if (now.written <= seen_ || now.slots == 0) return {};
        const auto at = sizeof(Ring) + (now.written - 1) % now.slots * now.slot_bytes;
        if (at + now.slot_bytes > size_ || now.slot_bytes < sizeof(Header)) return {};
        Mask mask;
        std::memcpy(&mask.header, memory_ + at, sizeof(Header));
        const auto& header = mask.header;
        const auto bytes = std::uint64_t{header.height} * header.width * header.pixel_bytes;
        if (std::memcmp(header.magic, "KNM1", 4) != 0 || header.sequence != now.written - 1 ||
            bytes > now.slot_bytes - sizeof(Header))
            return {};  // it is being written over
        mask.pixels.assign(memory_ + at + sizeof(Header), memory_ + at + sizeof(Header) + bytes);
        if (crc32(mask.pixels) != header.crc) return {};
        seen_ = now.written;
        return mask;
    }

private:
    Ring head() const {
        Ring ring;
        std::memcpy(&ring, memory_, sizeof(Ring));
        return ring;
    }

    bool attach() {
        const int file = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) return false;
        struct stat status {};
        void* memory = MAP_FAILED;
        if (fstat(file, &status) == 0 && static_cast<std::size_t>(status.st_size) >= sizeof(Ring))
            memory = mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED || std::memcmp(memory, "KNR1", 4) != 0) {
            if (memory != MAP_FAILED) munmap(memory, static_cast<std::size_t>(status.st_size));
            close(file);
            return false;  // it was made this moment, or is something else
        }
        detach();
        file_ = file;
        size_ = static_cast<std::size_t>(status.st_size);
        memory_ = static_cast<const std::uint8_t*>(memory);
        missing_.reset();
        return true;
    }

    void detach() {
        if (memory_ != nullptr) munmap(const_cast<std::uint8_t*>(memory_), size_);
        if (file_ >= 0) close(file_);
        memory_ = nullptr;
        file_ = -1;
    }

    std::string path_;
    int file_ = -1;
    std::size_t size_ = 0;
    const std::uint8_t* memory_ = nullptr;
    std::uint64_t seen_ = 0;
    std::optional<std::chrono::steady_clock::time_point> missing_;  // since when, while replaced
};

int main(int argc, char** argv) try {
    if (argc != 2) throw std::runtime_error("usage: read_masks NAME");
    Reader reader(argv[1]);
    while (true) {
        const bool last = reader.at_end();  // asked first: what was written before it is still read
        if (const auto mask = reader.newest()) {
            const auto& header = mask->header;
            std::map<unsigned, std::uint64_t> pixels;
            for (std::size_t at = 0; at < mask->pixels.size(); at += header.pixel_bytes) {
                unsigned value = mask->pixels[at];
                if (header.pixel_bytes == 2) value |= unsigned{mask->pixels[at + 1]} << 8;
                ++pixels[value];
            }
            std::cout << header.sequence << " frame " << header.frame << ' ' << header.width << 'x' << header.height;
            if (header.flags & 1) std::cout << " stale";
            for (const auto& [value, count] : pixels) std::cout << ' ' << value << ':' << count;
            std::cout << std::endl;
        } else if (last) {
            return 0;
        } else {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    }
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
