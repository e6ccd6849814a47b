# shellcheck shell=bash
# Whether this machine can run guests itself, and what Cargo built.

# native_kvm: true when KVM here runs unmodified kernels. A /dev/kvm alone does
# not say so: other modules offer one that can't.
native_kvm() {
    [[ -e /sys/module/kvm_amd || -e /sys/module/kvm_intel ]] && [[ -r /dev/kvm && -w /dev/kvm ]]
}

# why_not_native: the condition that fails, for the user.
why_not_native() {
    if [[ ! -e /dev/kvm ]]; then
        echo "there is no /dev/kvm"
    elif [[ ! -e /sys/module/kvm_amd && ! -e /sys/module/kvm_intel ]]; then
        echo "neither kvm_amd nor kvm_intel is loaded"
    else
        echo "/dev/kvm is not this user's to open"
    fi
}

need_rust() {
    if ! command -v cargo >/dev/null; then
        die "there is no cargo: install Rust $(rust_version) or newer (with rustup, a Debian package from 13 on: apt-get install rustup && rustup default stable)"
    fi
    if ! command -v cc >/dev/null; then
        need_packages gcc libc6-dev
    fi
}

rust_version() {
    sed -n 's/^rust-version = "\(.*\)"/\1/p' "$project/Cargo.toml"
}

# cargo_executable NAME ARGS...: builds with `cargo ARGS` and prints the path of
# the executable of the target NAME, wherever Cargo is told to put it.
cargo_executable() {
    local name=$1 path
    shift
    path=$(cd "$project" && cargo "$@" --locked --message-format=json-render-diagnostics |
        sed -n 's/.*"name":"'"$name"'".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    if [[ -z $path ]]; then
        die "cargo $* made no executable '$name'"
    fi
    printf '%s\n' "$path"
}
