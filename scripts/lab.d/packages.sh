# shellcheck shell=bash
# Debian packages that this machine must have.

# need_packages PACKAGE...: installs what this machine lacks, as root; else says
# exactly what to install.
need_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query --show --showformat '${db:Status-Status}\n' "$package" 2>/dev/null |
            grep -qx installed || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then return 0; fi
    if ((EUID != 0)); then
        echo "missing Debian packages: ${missing[*]}; install them with: apt-get install ${missing[*]}" >&2
        return 1
    fi
    echo "installing ${missing[*]}"
    if ! DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"; then
        # The package lists of a fresh image are often absent or out of date.
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"
    fi
}
