#!/bin/sh
# Fill training/fonts with the fonts that fonts.txt names, from their Debian packages. Needs root.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
list=$(grep -v '^#' "$here/fonts.txt")

apt-get update
apt-get install --yes --no-install-recommends $(echo "$list" | cut -d' ' -f1 | sort -u)

mkdir -p "$here/fonts"
echo "$list" | while read -r package file; do
    cp "$(dpkg -L "$package" | grep "/$file\$" | head -n 1)" "$here/fonts/$file"
done
