#!/bin/sh
# Unpacks the Debian packages whose texts train and test the long-context adapter into a folder (default .cache/texts).
# Needs apt-get and dpkg-deb, but neither root nor an installation.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.cache/texts}

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
  echo "fetch_texts: needs apt-get and dpkg-deb (a Debian system)" >&2
  exit 1
}
mkdir -p "$folder/packages"
folder=$(cd "$folder" && pwd)
cd "$folder/packages"
for package in bible-kjv bible-kjv-text python3.11-doc debian-handbook debian-reference-en developers-reference; do
  ls "$package"_*.deb >/dev/null 2>&1 || apt-get download -qq -o APT::Sandbox::User=root "$package"
  dpkg-deb -x "$package"_*.deb "$folder"
  echo "fetch_texts: $package"
done
echo "fetch_texts: ready in $folder"
