# go_run.sh GO_VERSION online|offline FILE ARGUMENT…: compile the program FILE with the session's files, and become it.
#
# The program takes the place of main.go, by an overlay if it couldn't have that name. The session is a module: its own
# where it has a go.mod, else one called "session". Positions in messages are those of main.go.
#
# What was built is kept, by a hash of all that it is made of, and isn't built again. Where that isn't known for certain
# (links, replaced modules, workspaces, embedded files, other variables of Go's that name files) Go decides.
directory=$PWD
case $3 in /*) cd "${3%/*}" ;; esac # it is to start in another directory than its own
file=${3##*/}
version=$1 network=$2
shift 3

cache=${GOCACHE%/*} modules=/opt/env-go

inputs() { # a hash of what the program is made of, or nothing; few programs are started for it
  if [ "$GOFLAGS" != "-buildvcs=false -modcacherw" ] || [ "$GOENV" != off ]; then return; fi
  if [ -n "$GOROOT$GOWORK$GOMODCACHE$GOTOOLDIR" ] || [ -e go.work ]; then return; fi
  read -r toolchain </opt/go/VERSION
  sources=$(
    find . -type l -print -o -type f \( -name '*.go' -o -name 'go.*' -o -name modules.txt -o -name '*.[chmsSfF]' \
      -o -name '*.c[cpx]*' -o -name '*.h[hpx]*' -o -name '*.s[xyw]*' -o -name '*.f[o9]*' \) -exec sha256sum {} + 2>&1
  ) || return
  case $sources in ./* | *"
./"*) return ;; esac # links: what they lead to may be anywhere
  if [ -d $modules ]; then sources="$sources $(cat $modules/go.sum)"; fi
  given=$(export -p | while read -r _ each; do case $each in GO* | CGO_*) printf '%s\n' "$each" ;; esac done)
  hash=$(printf '%s\n' "$PWD" "$file" "$toolchain" "$given" "$sources" | sha256sum)
  echo "${hash%% *}"
}

variables=$GOFLAGS
key=$(inputs)
if [ -d $modules ]; then export GOMODCACHE=$modules/mod GOFLAGS="$GOFLAGS -mod=mod -modfile=$cache/go.mod"; fi
if [ -n "$key" ] && [ -x "$cache/programs/$key" ]; then
  [ "$cache/programs/$key" -ef "$cache/program" ] || ln -f "$cache/programs/$key" "$cache/program" || exit 1
  cd "$directory" && exec "$cache/program" "$@"
fi

if [ ! -e "$GOCACHE/trim.txt" ]; then
  mkdir -p "$GOCACHE" "$cache/gopath"
  if [ -d /opt/go-std/ready ]; then cp -rs /opt/go-std/ready/. "$GOCACHE"; rm -f "$GOCACHE/trim.txt"; fi
  date +%s >"$GOCACHE/trim.txt" # or Go would go through all of it and throw out what is old
fi

replaced=
if [ "$file" != main.go ]; then replaced="\"$PWD/main.go\":\"$PWD/$file\""; fi
if [ -d $modules ]; then
  # The session's setup brought these. What they add to go.mod and go.sum is nobody's file.
  cat $modules/go.sum >"$cache/go.sum"
  if [ -e go.sum ]; then cat go.sum >>"$cache/go.sum"; fi
  if [ -e go.mod ]; then cat go.mod >"$cache/go.mod"; else cat $modules/go.mod >"$cache/go.mod"; fi
elif [ ! -e go.mod ]; then
  printf 'module session\n\ngo %s\n' "$version" >"$cache/go.mod"
fi
if [ ! -e go.mod ]; then
  replaced="$replaced${replaced:+,}\"$PWD/go.mod\":\"$cache/go.mod\""
fi
printf '{"Replace":{%s}}' "$replaced" >"$cache/overlay.json"

# Without internet the error should name the missing module, not an address that can't be reached.
offline=off
if [ "$network" = online ] && [ ! -d $modules ]; then offline=; fi
HOME=/nonexistent GOMAXPROCS=2 GOPROXY=${GOPROXY:-$offline} \
  go build -p 2 -ldflags=-w -overlay "$cache/overlay.json" -o "$cache/program" . >&2 || exit 1

# Unless it embeds files or has modules replaced, or a process has changed something meanwhile. The cache is memory.
if [ -n "$key" ] && ! grep -qs '^[[:space:]]*replace' go.mod && ! grep -rqs --include='*.go' go:embed . &&
  [ "$(unset GOMODCACHE; GOFLAGS=$variables; inputs)" = "$key" ]; then
  mkdir -p "$cache/programs"
  ls -t "$cache/programs" | tail -n +4 | while read -r old; do rm -f "$cache/programs/$old"; done
  ln -f "$cache/program" "$cache/programs/$key"
fi
cd "$directory" && exec "$cache/program" "$@"
