//! Secrets, hashes, shards, and the files of the broker made of them: pure.
