# shellcheck shell=bash
# Artefacts: folders that are slow to make, made once.
#
# An artefact NAME is a symbolic link in the cache to a folder in `.store`
# beside it. The folder's name ends in a digest of its recipe, so a changed
# recipe makes a new folder, and a run that uses the old one is not disturbed.
# A folder gets its final name only when it is complete, with checksums in it.

# digest: of standard input, short.
digest() {
    sha256sum | cut -c1-12
}

# artefact NAME RECIPE TEXT FUNCTION [FILES...]
#
# Makes $cache/NAME unless it is there already for this RECIPE (any text).
# FUNCTION is called with the folder to fill; what it leaves in a folder whose
# making was interrupted is still there the next time. The root keeps the packages
# that it has, the lab kernel all that is built; the others begin anew.
# FILES (relative) are checksummed; they are verified when the artefact is used.
# Of the root these are two of its thousands: damage elsewhere shows when it is used.
artefact() {
    local name=$1 recipe=$2 text=$3 function=$4
    shift 4
    local link=$cache/$name
    local store final id
    store=$(dirname "$link")/.store
    id=$(digest <<<"$recipe")
    final=$store/$(basename "$name")-$id

    if [[ ! -e $final/complete ]]; then
        mkdir -p "$store"
        lock_store
        # Another run may have made it while this one waited for the lock.
        if [[ ! -e $final/complete ]]; then
            mkdir -p "$final.partial"
            step "$text" "$cache/log/$(basename "$name").log" "$function" "$final.partial"
            (cd "$final.partial" && if (($#)); then sha256sum -- "$@"; fi >SHA256SUMS)
            printf '%s\n' "$recipe" >"$final.partial/recipe"
            : >"$final.partial/complete"
            mv -T "$final.partial" "$final"
        fi
        unlock_store
    fi
    # An artefact that is damaged is set aside and made again rather than used.
    if ! (cd "$final" && { [[ ! -s SHA256SUMS ]] || sha256sum --quiet --check SHA256SUMS >/dev/null 2>&1; }); then
        lock_store
        say "$name does not match its checksums any more: making it again"
        rm -rf "$final.damaged"
        mv -T "$final" "$final.damaged"
        unlock_store
        artefact "$name" "$recipe" "$text" "$function" "$@"
        return
    fi
    if [[ $(readlink "$link" 2>/dev/null) != ".store/${final##*/}" ]]; then
        # A link is replaced by renaming a new one over it: no moment without.
        ln -sfn ".store/${final##*/}" "$link.new.$$"
        mv -T "$link.new.$$" "$link"
    fi
}

# One maker at a time in a cache. What a step starts does not inherit the descriptor
# (say.sh): a daemon that it leaves behind cannot hold the lock.
lock_store() {
    mkdir -p "$cache"
    exec {store_lock}>"$cache/.lock"
    if ! flock --nonblock "$store_lock"; then
        say "another run is making artefacts in $cache: waiting for it"
        flock "$store_lock"
    fi
}

unlock_store() {
    exec {store_lock}>&-
    store_lock=
}

clean_store() {
    lock_store
    local store entry name
    for store in "$cache/.store" "$cache"/*/.store; do
        [[ -d $store ]] || continue
        for entry in "$store"/*; do
            [[ -e $entry ]] || continue
            name=${entry##*/}
            if [[ $(readlink -f "$store/../${name%-*}" || true) != "$(readlink -f "$entry")" ]]; then
                say "removing $entry"
                rm -rf --one-file-system "$entry"
            fi
        done
    done
    unlock_store
}
