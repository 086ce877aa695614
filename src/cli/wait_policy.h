// How threads wait for each other. A language model crosses hundreds of short parallel loops a token.
// Spinning threads are fastest on idle cores (210 against 150 tokens a second, two threads); beside one
// other busy process a spinning thread keeps its partner off the core, for milliseconds a loop (0.8
// against 160).
#pragma once

namespace heed::cli {

/// If other processes are using the cores, starts this program again with sleeping threads: OpenMP's
/// library reads OMP_WAIT_POLICY only when it is loaded. Does nothing where the user has set it.
void sleep_when_idle_on_shared_cores(char** argv);

}  // namespace heed::cli
