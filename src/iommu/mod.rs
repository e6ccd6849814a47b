//! IOMMUs between functions and guest memory.
