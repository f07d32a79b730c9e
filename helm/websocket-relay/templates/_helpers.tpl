{{- define "websocket-relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimAll "-" -}}
{{- end -}}

{{- define "websocket-relay.fullname" -}}
{{- $name := include "websocket-relay.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* 53, so that a suffix fits, too */ -}}
{{- default $full .Values.fullnameOverride | trunc 53 | trimAll "-" -}}
{{- end -}}

{{- define "websocket-relay.serviceAccountName" -}}
{{- $own := ternary (include "websocket-relay.fullname" .) "default" .Values.serviceAccount.create -}}
{{- default $own .Values.serviceAccount.name -}}
{{- end -}}

{{- define "websocket-relay.image" -}}
{{- with .Values.image -}}
{{- $registry := default .registry (default dict $.Values.global).imageRegistry -}}
{{- with $registry }}{{ . }}/{{ end -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- /* Select the relays' pods. Never changed: a Deployment's selector is immutable. */ -}}
{{- define "websocket-relay.selectorLabels" -}}
app.kubernetes.io/name: {{ include "websocket-relay.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: relay
{{- end -}}

{{- /* Select the pod of `helm test`. A selector by name alone, as in a runbook, does not match it. */ -}}
{{- define "websocket-relay.testLabels" -}}
app.kubernetes.io/name: {{ include "websocket-relay.name" . | trunc 58 | trimSuffix "-" | printf "%s-test" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: test
{{- end -}}

{{- /* Labels that change with a release, and so are not part of a selector. */ -}}
{{- define "websocket-relay.releaseLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* The labels of an object, from a list: the root context, then labels of which the first ones have precedence. */ -}}
{{- define "websocket-relay.mergedLabels" -}}
{{- $labels := dict -}}
{{- range rest . -}}
{{- $labels = merge $labels (default dict .) -}}
{{- end -}}
{{- merge $labels (default dict (first .).Values.commonLabels) | toYaml -}}
{{- end -}}

{{- /* The same with those that all objects have. */ -}}
{{- define "websocket-relay.labels" -}}
{{- $root := first . -}}
{{- $own := list (include "websocket-relay.selectorLabels" $root | fromYaml) (include "websocket-relay.releaseLabels" $root | fromYaml) -}}
{{- include "websocket-relay.mergedLabels" (concat (list $root) $own (rest .)) -}}
{{- end -}}

{{- define "websocket-relay.path" -}}
{{- .Values.config.server.base_path | default "/" -}}
{{- end -}}

{{- /* The values of `secrets` and the relay's variables with the paths of their files. */ -}}
{{- define "websocket-relay.secretVariables" -}}
backplaneUrl: RELAY__BACKPLANE__URL_FILE
backplanePassword: RELAY__BACKPLANE__PASSWORD_FILE
backplaneCreds: RELAY__BACKPLANE__CREDS_FILE
backplaneNkey: RELAY__BACKPLANE__NKEY_FILE
hooksSecret: RELAY__HOOKS__SECRET_FILE
jwtSecret: RELAY__AUTH__JWT__SECRET_FILE
jwtSecrets: RELAY__AUTH__JWT__SECRETS_FILE
jwtPublicKey: RELAY__AUTH__JWT__PUBLIC_KEY_FILE
apiKey: RELAY__API__KEY_FILE
{{- end -}}

{{- /* The keys of Secrets that are files of the relay, as a JSON list. Files of a volume follow their Secret, and
       variables do not. */ -}}
{{- define "websocket-relay.secretFiles" -}}
{{- $files := list -}}
{{- range $value, $variable := include "websocket-relay.secretVariables" . | fromYaml -}}
{{- $secret := get $.Values.secrets $value -}}
{{- if $secret.name -}}
{{- $files = append $files (dict "secret" $secret.name "key" $secret.key "file" (kebabcase $value) "variable" $variable) -}}
{{- end -}}
{{- end -}}
{{- with .Values.tls.caSecretName -}}
{{- $files = append $files (dict "secret" . "key" "ca.crt" "file" "broker-ca.crt" "variable" "RELAY__BACKPLANE__CA_FILE") -}}
{{- end -}}
{{- with .Values.tls.clientSecretName -}}
{{- $files = append $files (dict "secret" . "key" "tls.crt" "file" "broker-client.crt" "variable" "RELAY__BACKPLANE__CERT_FILE") -}}
{{- $files = append $files (dict "secret" . "key" "tls.key" "file" "broker-client.key" "variable" "RELAY__BACKPLANE__KEY_FILE") -}}
{{- end -}}
{{- toJson $files -}}
{{- end -}}

{{- /* Probes use the metrics port, which has no TLS, or the relay's port if there is no metrics port. */ -}}
{{- define "websocket-relay.probe" -}}
httpGet:
  path: {{ .path }}
  {{- with .root.Values.config }}
  {{- if .metrics.enabled }}
  port: metrics
  {{- else }}
  port: websocket
  scheme: {{ ternary "HTTPS" "HTTP" .server.tls.enabled }}
  {{- end }}
  {{- end }}
{{ toYaml .times }}
{{- end -}}

{{- /* The relay ends after shutdown.timeout_s at the latest; the kubelet has to wait longer. */ -}}
{{- define "websocket-relay.gracePeriod" -}}
{{- $computed := add (.Values.config.shutdown.timeout_s | float64 | ceil) 5 -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{ $computed }}
{{- else -}}
{{ .Values.terminationGracePeriodSeconds | int }}
{{- end -}}
{{- end -}}

{{- /* How long a pod that stops has clients. */ -}}
{{- define "websocket-relay.drainSeconds" -}}
{{- with .Values.config.shutdown -}}
{{ addf .readiness_delay_s .spread_s | ceil }}
{{- end -}}
{{- end -}}

{{- /* A budget counts the pods that are ready, and so not those that stop: the replacement of an evicted pod is
       ready when that pod has no clients any more. A single replica is missed at once. */ -}}
{{- define "websocket-relay.readinessDelay" -}}
{{- if hasKey .Values.probes.readiness "initialDelaySeconds" -}}
{{ .Values.probes.readiness.initialDelaySeconds | int }}
{{- else -}}
{{ ternary (include "websocket-relay.drainSeconds" .) "0" (or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1)) }}
{{- end -}}
{{- end -}}

{{- define "websocket-relay.minReadySeconds" -}}
{{- if kindIs "invalid" .Values.minReadySeconds -}}
{{ sub (include "websocket-relay.drainSeconds" . | int) (include "websocket-relay.readinessDelay" . | int) | max 0 }}
{{- else -}}
{{ .Values.minReadySeconds | int }}
{{- end -}}
{{- end -}}

{{- /* A quantity of Kubernetes in bytes; empty if it is empty or has a unit that no memory has. */ -}}
{{- define "websocket-relay.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if or (kindIs "float64" .) (kindIs "int64" .) -}}
{{ int64 . }}
{{- else if regexMatch "^[0-9.]+([kMGT]|[KMGT]i)?$" (toString .) -}}
{{ mulf (regexFind "^[0-9.]+" .) (get $units (regexFind "[A-Za-z]*$" .)) | int64 }}
{{- end -}}
{{- end -}}

{{- /* Of the container; empty without a limit. */ -}}
{{- define "websocket-relay.memoryLimit" -}}
{{- include "websocket-relay.bytes" (dig "limits" "memory" "" (default dict .Values.resources)) -}}
{{- end -}}

{{- /* The scheme of the broker's address; empty if that is in a Secret. */ -}}
{{- define "websocket-relay.backplane" -}}
{{- if not .Values.secrets.backplaneUrl.name -}}
{{ regexFind "^[a-z]+([+][a-z]+)?" .Values.config.backplane.url }}
{{- end -}}
{{- end -}}

{{- /* The ports in config.backplane.url, which may list several servers, as a JSON list. */ -}}
{{- define "websocket-relay.brokerPorts" -}}
{{- $scheme := include "websocket-relay.backplane" . -}}
{{- $usual := dict "redis" 6379 "valkey" 6379 "nats" 4222 "tls" 4222 -}}
{{- $port := get $usual (regexFind "^(redis|valkey|nats|tls)" $scheme) -}}
{{- $sentinels := hasSuffix "+sentinel" $scheme -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.broker.ports -}}
{{- $ports = append $ports (int .) -}}
{{- end -}}
{{- if and (not $ports) $port -}}
{{- $servers := regexReplaceAll "^[a-z+]+://|[/?].*$" .Values.config.backplane.url "" -}}
{{- range splitList "," $servers -}}
{{- $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" .) | default (ternary 26379 $port $sentinels) | int) -}}
{{- end -}}
{{- /* The Sentinels name a Redis, whose port is probably the usual one. */ -}}
{{- $ports = ternary (append $ports $port) $ports $sentinels -}}
{{- end -}}
{{- uniq $ports | toJson -}}
{{- end -}}
