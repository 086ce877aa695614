// How threads wait for each other. A language model crosses hundreds of short parallel loops a token.
// Spinning threads are fastest on idle cores (210 against 150 tokens a second, two threads); beside one
// other busy process a spinning thread keeps its partner off the core, for milliseconds a loop (0.8
// against 160).
#pragma once
#include <optional>

namespace heed::cli {

/// Whether so many threads find no core each among these while `others` want one too. Which cores the others
/// are on is not known: all count, as sleeping in vain costs a third and spinning in vain a hundredfold.
bool cores_are_short(int others, int threads, int cores);

/// The last number behind --threads, none where no number is; the arguments end with a null.
std::optional<int> threads_of(char** argv);

/// If the cores are short, starts this program again with sleeping threads: OpenMP's
/// library reads OMP_WAIT_POLICY only when it is loaded. Does nothing where the user has set it.
void sleep_when_idle_on_shared_cores(char** argv);

}  // namespace heed::cli
