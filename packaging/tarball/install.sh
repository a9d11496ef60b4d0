#!/bin/sh
# install.sh [--prefix DIR] [--destdir DIR] [--no-service] [--dry-run]      installs what lies beside this file
# install.sh --uninstall [--purge] [--prefix DIR] [--destdir DIR] [--dry-run]    removes what an installation put there
#
# PREFIX is /usr/local, or ~/.local for who is not root. Root also gets the systemd unit, the user `kvoyant` and /etc/kvoyant/kvoyantd.toml
# (one that is there stays as it is), unless --no-service. Nothing is started. --uninstall leaves the configuration and /var/lib/kvoyant;
# with --purge they go too. The user stays, so that nobody else gets its number. --dry-run says what would be done, and does nothing.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
prefix="" destdir="" uninstall=no purge=no dry=no service=yes
usage() { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -ge 2 ] || usage; prefix=$2; shift ;;
        --destdir) [ $# -ge 2 ] || usage; destdir=$2; shift ;;
        --uninstall) uninstall=yes ;;
        --purge) purge=yes ;;
        --no-service) service=no ;;
        --dry-run) dry=yes ;;
        *) usage ;;
    esac
    shift
done
[ "$purge" = no ] || [ "$uninstall" = yes ] || usage
root=no
[ "$(id -u)" != 0 ] || root=yes
if [ -z "$prefix" ]; then
    if [ $root = yes ]; then prefix=/usr/local; else prefix=${HOME:?}/.local; fi
fi
case $prefix in /*) ;; *) echo "install.sh: --prefix has to begin with /: $prefix" >&2; exit 2 ;; esac
[ $root = yes ] || service=no

do_it() {
    if [ $dry = yes ]; then echo "would: $*"; else "$@"; fi
}

# Where the list of what was installed lies.
list=$prefix/share/kvoyant/installed

if [ $uninstall = yes ]; then
    if [ ! -f "$destdir$list" ]; then
        echo "install.sh: nothing is installed below $prefix: there is no $destdir$list" >&2
        exit 1
    fi
    if [ -z "$destdir" ] && [ -d /run/systemd/system ] && grep -q '/kvoyantd\.service$' "$list"; then
        if grep -q '/kvoyantd\.socket$' "$list"; then do_it systemctl disable --now kvoyantd.socket || true; fi
        do_it systemctl disable --now kvoyantd.service || true
    fi
    while IFS= read -r file; do
        do_it rm -f "$destdir$file"
    done <"$destdir$list"
    do_it rm -f "$destdir$list"
    do_it rmdir "$destdir$prefix/share/kvoyant" 2>/dev/null || true
    if [ $purge = yes ]; then
        do_it rm -rf "$destdir/etc/kvoyant" "$destdir/var/lib/kvoyant"
    elif [ -d "$destdir/etc/kvoyant" ] || [ -d "$destdir/var/lib/kvoyant" ]; then
        echo "left: /etc/kvoyant and /var/lib/kvoyant (--purge takes them too)"
    fi
    exit 0
fi

# The oldest C library that the programs run with, as the package was made.
need=$(cat "$here/GLIBC")
have=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
if [ -z "$have" ] || [ "$(printf '%s\n%s\n' "$need" "$have" | sort -V | head -n 1)" != "$need" ]; then
    echo "install.sh: the programs need glibc $need or newer, and here is ${have:-another C library}: build from source" >&2
    exit 1
fi

new=$(mktemp)
trap 'rm -f "$new"' EXIT
put() { # put MODE FROM TO
    do_it install -D -m "$1" "$2" "$destdir$3"
    echo "$3" >>"$new"
}

put 755 "$here/bin/kvoyant" "$prefix/bin/kvoyant"
put 755 "$here/bin/kvoyantd" "$prefix/bin/kvoyantd"
(cd "$here" && find share lib include \( -type f -o -type l \) 2>/dev/null | sort) >"$new.files" || true
while IFS= read -r file; do
    if [ -L "$here/$file" ]; then
        do_it ln -sf "$(readlink "$here/$file")" "$destdir$prefix/$file"
        echo "$prefix/$file" >>"$new"
    else
        put 644 "$here/$file" "$prefix/$file"
    fi
done <"$new.files"
if [ $dry = no ] && [ -f "$destdir$prefix/lib/pkgconfig/kvoyant.pc" ]; then
    sed -i "s|^prefix=.*|prefix=$prefix|" "$destdir$prefix/lib/pkgconfig/kvoyant.pc"
fi
rm -f "$new.files"

if [ $service = yes ]; then
    unit=$(mktemp)
    sed "s|/usr/bin/kvoyantd|$prefix/bin/kvoyantd|" "$here/systemd/kvoyantd.service" >"$unit"
    put 644 "$unit" /etc/systemd/system/kvoyantd.service
    rm -f "$unit"
    put 644 "$here/systemd/kvoyantd.socket" /etc/systemd/system/kvoyantd.socket
    put 644 "$here/systemd/kvoyant.sysusers" /etc/sysusers.d/kvoyant.conf
    put 644 "$here/systemd/kvoyant.tmpfiles" /etc/tmpfiles.d/kvoyant.conf
    if [ ! -e "$destdir/etc/kvoyant/kvoyantd.toml" ]; then
        do_it install -D -m 644 "$here/systemd/kvoyantd.toml" "$destdir/etc/kvoyant/kvoyantd.toml"
    else
        echo "kept: /etc/kvoyant/kvoyantd.toml"
    fi
    if [ -z "$destdir" ] && [ $dry = no ]; then
        if command -v systemd-sysusers >/dev/null; then systemd-sysusers kvoyant.conf; fi
        if command -v systemd-tmpfiles >/dev/null; then systemd-tmpfiles --create kvoyant.conf; fi
        if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
    fi
fi
if [ $dry = no ]; then install -D -m 644 "$new" "$destdir$list"; fi

echo "installed below $prefix"
case :$PATH: in *:"$prefix/bin":*) ;; *) echo "$prefix/bin is not on PATH" ;; esac
if [ $service = yes ]; then
    echo "next: edit /etc/kvoyant/kvoyantd.toml; usermod -aG kvoyant USER; systemctl enable --now kvoyantd"
else
    echo "next: kvoyantd --arena 1GiB &   then   kvoyant status"
fi
