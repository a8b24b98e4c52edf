"""What is written to disk and read back: run state, sparse model directories, their verification."""
