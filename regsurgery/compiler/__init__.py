"""The compiler: trace, match, passes, modes."""
