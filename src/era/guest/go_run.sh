# go_run.sh GO_VERSION online|offline FILE ARGUMENT…: compile the program FILE with the session's files, and become it.
#
# The program takes the place of main.go, by an overlay if it couldn't have that name. The session is a module: its own
# where it has a go.mod, else one called "session". Positions in messages are those of main.go.
directory=$PWD
case $3 in /*) cd "${3%/*}" ;; esac # it is to start in another directory than its own
file=${3##*/}
version=$1 network=$2
shift 3

cache=${GOCACHE%/*}
if [ ! -e "$GOCACHE/trim.txt" ]; then
  mkdir -p "$GOCACHE" "$cache/gopath"
  if [ -d /opt/go-std/ready ]; then cp -rs /opt/go-std/ready/. "$GOCACHE"; rm -f "$GOCACHE/trim.txt"; fi
  date +%s >"$GOCACHE/trim.txt" # or Go would go through all of it and throw out what is old
fi

replaced=
if [ "$file" != main.go ]; then replaced="\"$PWD/main.go\":\"$PWD/$file\""; fi
modules=/opt/env-go
if [ -d $modules ]; then
  # The session's setup brought these. What they add to go.mod and go.sum is nobody's file.
  export GOMODCACHE=$modules/mod GOFLAGS="$GOFLAGS -mod=mod -modfile=$cache/go.mod"
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
cd "$directory" && exec "$cache/program" "$@"
