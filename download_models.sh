#!/usr/bin/env bash
# Fetches the published files that Neon's programs open, to where they look for them; see --help.
#
# A file gets its own name only when it is whole and recognised; until then it is FILE.part: a file that curl continues,
# or a folder of hf's, which goes on by itself where a connection breaks (but huggingface_hub 2 forgets a killed one).
set -uo pipefail
export LC_ALL=C # bytes are bytes

usage() {
    cat <<'END'
Fetch the published files that Neon's programs open, to where they look for them: below the working directory, and in
the caches of torch and neon. What is there and whole is skipped, an interrupted transfer goes on.

    bash download_models.sh                # Neon's checkpoints, autoencoders, statistics, Inception
    bash download_models.sh --only edm     # those of one architecture: edm, VAR, xAR or imm
    bash download_models.sh --base         # the base models too
    bash download_models.sh --dry-run      # what would be fetched, from where and to where; touches nothing
    bash download_models.sh --list         # the table of files, tab-separated, as `neon doctor` reads it

HF_ENDPOINT names a mirror of Hugging Face. NEON_MIRROR names a server that holds all other files by their names
(NEON_MIRROR/cifar10-32x32.npz), those without a known address too.
Exit code: 0 everything asked for is there, 1 something is not, 2 the request was wrong.
END
}

# One file a line. MB: of its tensors in float32 (statistics: float64), so about the size of the file; `-` is not known.
# source: hf:REPOSITORY, the address of a folder, or by:PUBLISHER where no address is known.
# folders: it is fetched to the first, and may lie in any. TORCH, NEON, HUB: the caches of torch, neon, Hugging Face.
#
# The published README also names Neon_IMM_imagenet256.pth; what was released is Neon_imm_imagenet256.pkl.
nvidia=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/
models=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/
fidelity=https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/
here=.,checkpoints,pretrained
sd='sd-vae-ft-ema'
sd_folders=imm/pretrained/$sd,pretrained/$sd,checkpoints/$sd,HUB
TABLE="
# for           kind       MB   name                                       source                  folders
edm             neon       223  Neon_EDM_conditional_CIFAR10.pkl           hf:sinaalemohammad/Neon checkpoints
edm             neon       223  Neon_EDM_unconditional_CIFAR10.pkl         hf:sinaalemohammad/Neon checkpoints
edm             neon       247  Neon_EDM_FFHQ.pkl                          hf:sinaalemohammad/Neon checkpoints
edm             statistics 34   cifar10-32x32.npz                          $nvidia                 NEON
edm             statistics 34   ffhq-64x64.npz                             $nvidia                 NEON
edm             base       223  edm-cifar10-32x32-cond-vp.pkl              $models                 $here
edm             base       223  edm-cifar10-32x32-uncond-vp.pkl            $models                 $here
edm             base       247  edm-ffhq-64x64-uncond-vp.pkl               $models                 $here
VAR             neon       1243 Neon_VARd16_imagenet256.pth                hf:sinaalemohammad/Neon checkpoints
VAR             neon       9436 Neon_VARd36_imagenet512.pth                hf:sinaalemohammad/Neon checkpoints
VAR             vae        436  vae_ch160v4096z32.pth                      hf:FoundationVision/var $here
VAR             base       1243 var_d16.pth                                hf:FoundationVision/var $here
VAR             base       9436 var_d36.pth                                hf:FoundationVision/var $here
xAR             neon       693  Neon_xARB_imagenet256.pth                  hf:sinaalemohammad/Neon checkpoints
xAR             neon       2438 Neon_xARL_imagenet256.pth                  hf:sinaalemohammad/Neon checkpoints
xAR             vae        266  kl16.ckpt                                  hf:xwen99/mar-vae-kl16  xAR/pretrained,$here
xAR             base       693  xAR-B.pth                                  by:xAR                  $here
xAR             base       2438 xAR-L.pth                                  by:xAR                  $here
imm             neon       2707 Neon_imm_imagenet256.pkl                   hf:sinaalemohammad/Neon checkpoints
imm             vae        -    config.json                                hf:stabilityai/$sd      $sd_folders
imm             vae        335  diffusion_pytorch_model.safetensors        hf:stabilityai/$sd      $sd_folders
imm             base       2707 imagenet256_ts_a2.pkl                      by:IMM                  $here
VAR,xAR,imm     statistics 34   adm_in256_stats.npz                        hf:sinaalemohammad/Neon fid_stats
VAR             statistics 34   adm_in512_stats.npz                        hf:sinaalemohammad/Neon fid_stats
edm,VAR,xAR,imm inception  95   weights-inception-2015-12-05-6726825d.pth  $fidelity               TORCH
"

refuse() {
    echo "download_models.sh: $1" >&2
    exit 2
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

# Where a file comes from: hf:REPOSITORY, a URL, or by:PUBLISHER.
address() { # NAME SOURCE
    case $2 in
        hf:*) echo "$2" ;;
        *) if [ -n "${NEON_MIRROR:-}" ]; then echo "${NEON_MIRROR%/}/$1"; else echo "${2/%\//\/$1}"; fi ;;
    esac
}

# The paths at which a file may lie, a line each.
places() { # NAME SOURCE FOLDERS
    local name=$1 source=$2 folder cache=${XDG_CACHE_HOME:-$HOME/.cache} hub
    for folder in ${3//,/ }; do
        case $folder in
            TORCH) folder=${TORCH_HOME:-$cache/torch}/hub/checkpoints ;;
            NEON) # as neon/runtime/download.py names it
                folder=${NEON_CACHE:-$cache/neon}/$(printf %s "$source$name" | sha256 | cut -c 1-16)
                ;;
            HUB)
                hub=${HF_HUB_CACHE:-${HF_HOME:-$cache/huggingface}/hub}
                hub+=/models--${source#hf:}
                hub=${hub%/*}--${hub##*/}
                folder=$hub/snapshots/$(cat "$hub/refs/main" 2>/dev/null || echo main)
                ;;
        esac
        if [ "$folder" = . ]; then echo "$name"; else echo "$folder/$name"; fi
    done
}

megabytes() { # FILE
    echo $(($(wc -c <"$1") / 1000000))
}

# What is wrong with a file, if anything: content that its name does not promise, an end that is missing, too few bytes.
flaw() { # FILE NAME MB
    local file=$1 name=$2 mb=$3 bytes text magic
    bytes=$(wc -c <"$file")
    text=$(head -c 512 "$file" | tr -d '\0[:space:]' | tr '[:upper:]' '[:lower:]')
    magic=$(head -c 14 "$file" | od -An -tx1 | tr -d ' \n')
    case $text in
        '<!doctype'* | '<html'* | '<head'* | '<?xml'* | '<!--'*)
            echo "an HTML page in its place (a login page?)" && return ;;
        'versionhttps://git-lfs'*) echo "a Git LFS pointer in its place" && return ;;
    esac
    case $name:$magic in
        *:) echo "an empty file" && return ;;
        *.pth:504b0304* | *.ckpt:504b0304* | *.npz:504b0304*) # a zip archive, which ends with its directory
            tail -c 65557 "$file" | grep -acF $'PK\005\006' >/dev/null ||
                { echo "cut short, no end of archive" && return; } ;;
        *.pkl:800[2-5]*) # a pickle, which ends with a full stop
            [ "$(tail -c 1 "$file")" = . ] || { echo "cut short, no end of pickle" && return; } ;;
        *.pth:80028a0a6cfc9c46f9206aa85019 | *.ckpt:80028a0a6cfc9c46f9206aa85019) ;; # torch before 1.6
        *.safetensors:????????????????7b* | *.json:7b*) ;;
        *) echo "not a .${name##*.} file, it begins with the bytes ${magic:0:8}" && return ;;
    esac
    if [ "$mb" != - ] && [ "$bytes" -lt $((mb * 400000)) ]; then # half precision would be one half
        echo "only $bytes bytes, expected about $mb MB"
    elif [[ $name =~ -([0-9a-f]{8})\.pth$ ]] && [[ $(sha256 <"$file") != "${BASH_REMATCH[1]}"* ]]; then
        echo "its SHA-256 does not begin with ${BASH_REMATCH[1]}, as its name says" # the rule of torch.hub
    fi
}

# Whether the `log` of the caller matches.
says() { # PATTERN
    grep -qiE "$1" <<<"$log"
}

# Fetch with `hf` into a folder of its own, then move the file out of it. A failure says WHY.
fetch_hf() { # REPOSITORY NAME PATH MB
    local repository=$1 name=$2 folder=$3.part log status
    # Nothing continues these pieces: their names are unique to the process that wrote them.
    rm -f "$folder"/.cache/huggingface/download/*.????????.incomplete
    mkdir -p "$folder"
    log=$("$hf" download "$repository" "$name" --local-dir "$folder" 2>&1 >/dev/null </dev/null | tee >(cat >&2))
    status=$?
    if [ $status = 0 ] && [ -f "$folder/$name" ]; then
        accept "$folder/$name" "$name" "$3" "$4" || WHY="$repository: $WHY"
        rm -rf "$folder"
        return
    fi
    if [ $status = 0 ]; then
        WHY="hf ended well but brought no file; update it with \`pip install -U huggingface_hub\`"
    elif says 'no space left|not enough free disk|disk quota|file too large'; then
        WHY="the disk is full ($(free_mb "$folder") MB free); free some space and run again"
    elif says 'local entry not found|connection|unreachable|name resolution|name or service|timed out|offline'; then
        WHY="no connection to Hugging Face${HF_ENDPOINT:+ ($HF_ENDPOINT)}; check the network, run again to go on"
        unreachable+=" hf:"
    elif says 'gated|access denied|unauthorized|forbidden|error[^0-9]*40[13]|(repository|model) .*not found'; then
        WHY="Hugging Face has no repository $repository, or not for you; if it asks for a login: \`hf auth login\`"
    elif says 'not ?found|error[^0-9]*404'; then
        WHY="not in the repository $repository; was it renamed there?"
    else
        WHY="hf failed ($(tr '\r' '\n' <<<"$log" | grep '[^[:space:]]' | tail -n 1 | cut -c 1-200)); run again to go on"
    fi
    [ -n "$(find "$folder" -name '*.incomplete')" ] || rm -rf "$folder"
}

# Fetch with curl into PATH.part, from where an earlier run stopped. A failure says WHY.
fetch_url() { # URL NAME PATH MB
    local url=$1 part=$3.part answer status message bar=--silent
    [ -t 2 ] && bar=--progress-bar
    answer=$(curl --location --fail "$bar" --connect-timeout 30 --speed-time 60 --speed-limit 1 --retry 2 \
        --continue-at - --output "$part" --write-out '%{http_code} %{errormsg}' "$url")
    status=$?
    message=${answer#* }
    if [ -s "$part" ] && { [ $status = 33 ] || [ "${answer%% *}" = 416 ]; }; then
        rm "$part" # the server cannot continue, or what it has is no longer than this
        fetch_url "$@"
        return
    fi
    case $status:${answer%% *} in
        0:*)
            accept "$part" "$2" "$3" "$4" && return
            rm -f "$part"
            WHY="$url: $WHY"
            ;;
        22:404 | 22:410) WHY="$url: there is no such file any more (HTTP ${answer%% *}); check for a new address" ;;
        22:*) WHY="$url: the server answers HTTP ${answer%% *}; try again later" ;;
        5:* | 6:* | 7:* | 35:* | 60:*)
            WHY="$url: no connection ($message); check the network, run again to go on"
            unreachable+=" ${url%"${url#*//*/}"}"
            ;;
        23:*)
            WHY="writing $part failed, the disk is full ($(free_mb "$(dirname "$part")") MB free)"
            WHY+=" or files are limited (\`ulimit -f\`); make room and run again to go on"
            ;;
        *) WHY="$url: broken off after $(wc -c 2>/dev/null <"$part" || echo 0) bytes ($message); run again to go on" ;;
    esac
    [ -s "$part" ] || rm -f "$part"
}

# Give what was fetched its own name, if that is what it is; otherwise say WHY not.
accept() { # FETCHED NAME PATH MB
    WHY=$(flaw "$1" "$2" "$4")
    [ -z "$WHY" ] || return 1
    mv -f "$1" "$3" || { WHY="cannot be renamed to $3" && return 1; }
}

free_mb() { # FOLDER
    df -Pk "$1" | awk 'NR == 2 { printf "%d", $4 * 1024 / 1000000 }'
}

# Fetch one file, or say WHY not.
fetch() { # ADDRESS NAME PATH MB
    local address=$1 path=$3 mb=$4 folder free origin=hf:
    folder=$(dirname "$path")
    [ "${address#hf:}" != "$address" ] || origin=${address%"${address#*//*/}"}
    if [ "${address#by:}" != "$address" ]; then
        WHY="published by ${address#by:}, but this project knows no address of it; save it as $path, or set NEON_MIRROR"
    elif [ "$origin" = hf: ] && [ -z "$hf" ]; then
        WHY="hf is not installed; install it with \`pip install huggingface_hub\`"
    elif [ "$origin" != hf: ] && ! command -v curl >/dev/null; then
        WHY="curl is not installed; install it with the system's package manager"
    elif [[ " $unreachable " == *" $origin "* ]]; then
        WHY="no connection to ${origin/#hf:/Hugging Face}, as before"
    elif ! mkdir -p "$folder" 2>/dev/null || ! [ -w "$folder" ]; then
        WHY="cannot write in $folder; run in a folder that you may write to"
    else
        free=$(free_mb "$folder")
        [ ! -f "$path.part" ] || free=$((free + $(megabytes "$path.part"))) # what an earlier run left has its room
        if [ "$mb" != - ] && [ "$free" -lt "$mb" ]; then
            WHY="the disk is full: about $mb MB to come, $free MB free in $folder; free some space and run again"
        elif [ "$origin" = hf: ]; then
            fetch_hf "${address#hf:}" "$2" "$path" "$mb"
        else
            fetch_url "$address" "$2" "$path" "$mb"
        fi
    fi
    [ -z "$WHY" ]
}

only='' base='' mode=fetch
while [ $# -gt 0 ]; do
    case $1 in
        --only)
            [[ ${2:-} =~ ^(edm|VAR|xAR|imm)$ ]] || refuse "--only '${2:-}': expected edm, VAR, xAR or imm"
            only=$2
            shift
            ;;
        --base) base=yes ;;
        --dry-run) mode=show ;;
        --list) mode=list base=yes ;;
        -h | --help) usage && exit ;;
        *) refuse "$1: no such flag; expected --only, --base, --dry-run, --list or --help" ;;
    esac
    shift
done

hf=$(command -v hf || echo "$(dirname "$0")/.venv/bin/hf") # `make` installs it there
[ -x "$hf" ] || hf=''
present=0 fetched=0 failed=() unreachable='' to_come=0
trap 'echo "interrupted; run again to go on" >&2; exit 130' INT TERM

while read -r architectures kind mb name source folders <&3; do
    [[ -n $architectures && $architectures != '#' ]] || continue
    [ -z "$only" ] || [[ ",$architectures," == *",$only,"* ]] || continue
    [ -n "$base" ] || [ "$kind" != base ] || continue
    from=$(address "$name" "$source")
    paths=$(places "$name" "$source" "$folders")
    if [ $mode = list ]; then
        printf '%s\t%s\t%s\t%s\t%s\n' "$architectures" "$kind" "$mb" "$from" "${paths//$'\n'/$'\t'}"
        continue
    fi
    found='' damage=''
    while read -r path; do
        if [ -n "$found" ] || ! [ -f "$path" ]; then continue; fi
        wrong=$(flaw "$path" "$name" "$mb")
        if [ -z "$wrong" ]; then found=$path; else damage+=" ($path: $wrong)"; fi
    done <<<"$paths"
    target=${paths%%$'\n'*}
    if [ -n "$found" ]; then
        present=$((present + 1))
        printf '%-8s %6s MB  %s\n' present "$(megabytes "$found")" "$found"
    elif [ $mode = show ]; then
        to_come=$((to_come + ${mb/#-/0}))
        printf '%-8s %6s MB  %s  %s%s\n' missing "$mb" "$target" "$from" "$damage"
    else
        printf '%-8s %6s MB  %s  %s%s\n' fetching "$mb" "$target" "$from" "$damage"
        WHY=''
        if fetch "$from" "$name" "$target" "$mb"; then
            fetched=$((fetched + 1))
        else
            failed+=("$target: $WHY")
            echo "failed   $target: $WHY" >&2
        fi
    fi
done 3<<<"$TABLE"

case $mode in
    list) exit ;;
    show)
        echo "$to_come MB to come (as float32; the files may differ), $(free_mb .) MB free here; nothing was touched"
        exit
        ;;
esac
echo
echo "present: $present, fetched: $fetched, failed: ${#failed[@]}"
[ ${#failed[@]} = 0 ] || printf '  %s\n' "${failed[@]}"
echo "The files are their publishers' and under their licences, which are not recorded here: read them at each source."
[ ${#failed[@]} = 0 ]
