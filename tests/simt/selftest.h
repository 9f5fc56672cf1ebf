#pragma once

// Runs the kernel of that name (selftest.cu); throws what the emulator or a comparison has to say.
void selftest(const char* name);
