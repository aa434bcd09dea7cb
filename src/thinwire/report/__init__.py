"""One self-contained page about runs. Reads run folders only; needs neither torch nor the runtime."""
